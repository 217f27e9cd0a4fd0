"""logs/report.html: a run on one page that is complete in itself, without network or script.

Beside it curves.png and confusion_matrix.png. Everything format_metric is made from the run's state and
data, but where it was resumed, which the log knows.
"""

import base64
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cnn.config import as_text, to_yaml
from cnn.datasets.order import EVALUATION
from cnn.metrics import scores
from cnn.records import figures
from cnn.records.figures import BLUE, ORANGE, Curve
from cnn.records.pages import CLASS_HEAD, class_rows, format_metric, render
from cnn.training.setup import Run
from cnn.utils.files import write_atomically, write_text
from cnn.utils.progress import format_duration
from cnn.utils.run_folder import RunLogs

NUM_MISTAKES = 24
NUM_TRAINING_IMAGES = 32
NUM_PAIRS = 10  # of classes that are mixed up most
SPLITS = ("train", "val", "test")
THUMBNAIL = 96  # the longest side in pixels that is embedded
RESUMED = re.compile(r"==== resumed from .*: epoch \d+, step (\d+), batch")


class Report:
    """Writes the page and the two pictures; remembers what it need not draw again."""

    def __init__(self, logs: RunLogs, run: Run):
        self.cfg, self.logs, self.run, self.state = run.cfg, logs, run, run.state
        self._drawn: dict[str, tuple[object, Any]] = {}

    def write(self) -> None:
        """Replaces the page by one of the run as it stands."""
        write_text(self.logs.report, render("report.jinja", **self._content()))

    def write_pictures(self) -> None:
        """curves.png and confusion_matrix.png, of the test or, before it, the best epoch."""
        picture = figures.curves_png(self._panels(), self._resumes())
        write_atomically(self.logs.curves, lambda file: file.write(picture))
        split = "test" if "test" in self.state.predictions else "val"
        if split in self.state.predictions:
            title = "test" if split == "test" else f"validation, epoch {self.state.best['epoch']}"
            matrix = self._confusion(split)
            matrix_picture = figures.confusion_png(matrix, self.run.data.classes, title)
            path = self.logs.confusion_matrix
            write_atomically(path, lambda file: file.write(matrix_picture))

    def _once(self, what: str, make: Callable[[], Any], *, ever: bool = False) -> Any:
        """What `make` gives, made anew only where there is another best epoch or a test."""
        best, test = self.state.best, self.state.test
        now = None if ever else (best and best["epoch"], test is not None)
        if what not in self._drawn or self._drawn[what][0] != now:
            self._drawn[what] = (now, make())
        return self._drawn[what][1]

    # -- what the state says ------------------------------------------------------------------

    def _labels(self, split: str) -> np.ndarray:
        return getattr(self.run.data, split).labels

    def _confusion(self, split: str) -> np.ndarray:
        said = self.state.predictions[split]["prediction"].numpy()
        return scores.confusion(self._labels(split), said, len(self.run.data.classes))

    def _resumes(self) -> list[float]:
        """Where the run was resumed, in epochs, as its log tells."""
        try:
            log = self.logs.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        steps = {int(step) for step in RESUMED.findall(log)}
        return sorted(step / self.run.steps_per_epoch for step in steps if step < self.state.step)

    def _panels(self) -> list[tuple[str, list[Curve]]]:
        history = self.state.history
        epochs = [row["epoch"] for row in history]

        def curve(name: str, label: str, colour: str) -> Curve:
            return Curve(label, epochs, [row.get(name) for row in history], colour)

        panels = [
            (
                title,
                [curve(f"train_{name}", "train", BLUE), curve(f"val_{name}", "val", ORANGE)],
            )
            for title, name in (("Loss", "loss"), ("Accuracy", "acc"))
        ]
        if "val_auc" in history[-1]:
            panels.append(("AUC", [curve("val_auc", "val", ORANGE)]))
        lrs = [name for name in history[-1] if name == "lr" or name.startswith("lr_")]
        of_lr = [curve(lr, lr, colour) for lr, colour in zip(lrs, figures.COLOURS)]
        return [*panels, ("Learning rate", of_lr)]

    # -- the page -----------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        """All that the page shows, under the names that its template has."""
        cfg, history, marks = self.cfg, self.state.history, self._resumes()
        columns = list(history[-1])
        splits = [split for split in ("val", "test") if split in self.state.predictions]
        return self._headline() | {
            "title": f"{cfg.run + ': ' if cfg.run else ''}{cfg.model.name} on {cfg.data.name}",
            "curves": [figures.curves_svg(*panel, marks) for panel in self._panels()],
            "splits": [self._once(split, lambda s=split: self._judged(s)) for split in splits],
            "mistakes": self._once("mistakes", self._mistakes),
            "training": self._once("training", self._training_images, ever=True),
            "changes": as_text(cfg.data.augment)[1:-1] or "none",
            "parts": list(SPLITS),
            "counts": self._counts(),
            "columns": columns,
            "epochs": [[format_metric(row.get(name)) for name in columns] for row in history],
            "environment": list(self.run.environment.items()),
            "config": to_yaml(cfg),
        }

    def _headline(self) -> dict[str, Any]:
        """The result so far, what it is to be held against, and the command that gives it again."""
        state, data = self.state, self.run.data
        best, lines, result = state.best, [], "no result yet"
        if best is not None:
            row = state.history[best["epoch"] - 1]
            result = f"validation accuracy {scores.with_interval(row['val_acc'], len(data.val))}"
            lines.append(f"best epoch {best['epoch']} by {best['metric']} {best['value']:.4f}")
        split, stand = "val", "not yet tested"
        if state.test is not None:
            split, stand = "test", "tested"
            lines.append(f"{result}, {len(data.val)} images it was chosen by")
            accuracy = scores.with_interval(state.test["test_acc"], len(data.test))
            result = f"test accuracy {accuracy}"
        labels = self._labels(split)
        usual = int(np.bincount(data.train.labels, minlength=len(data.classes)).argmax())
        lines.append(
            f"always saying “{data.classes[usual]}”, the most frequent in training:"
            f" {float((labels == usual).mean()):.4f} of {len(labels)} {split} images"
        )
        seconds = sum(row["seconds"] for row in state.history)
        epochs = self.cfg.train.epochs
        lines.append(f"{state.epoch} of {epochs} epochs, {stand}; {format_duration(seconds)}")
        command = shlex.join(["python", "train.py", "--config", self.logs.config.as_posix()])
        commit = self.run.environment["git"]
        number, _, interval = result.partition(" (")
        return {
            "result": number,
            "interval": interval,
            "lines": lines,
            "command": command + (f"  # at git commit {commit}" if commit else ""),
        }

    def _judged(self, split: str) -> dict[str, Any]:
        """What a split's predictions come to: figures, matrix, what is mixed up most, every class."""
        matrix, classes = self._confusion(split), self.run.data.classes
        head, lines = f"Test, {matrix.sum()} images", []
        if split == "val":
            head = f"Validation, {matrix.sum()} images, epoch {self.state.best['epoch']}"
        else:
            metrics = self.state.test.items()
            figures_of = (
                f"{name.removeprefix('test_')} {format_metric(value)}" for name, value in metrics
            )
            lines.append(" · ".join(figures_of))
        if len(classes) == 2:
            lines.append(f"positive: {classes[1]}")
        rows, means = class_rows(matrix, classes)
        names = [figures.shorten_name(name) for name in classes]
        return {
            "name": split,
            "head": head,
            "lines": lines,
            "is_small": len(classes) <= figures.MAX_CLASSES_WITH_NUMBERS,
            "matrix": figures.confusion_svg(matrix, classes),
            "columns": CLASS_HEAD,
            "rows": rows,
            "means": means,
            "mixed": [
                [names[label], names[prediction], f"{count} of {matrix[label].sum()}"]
                for label, prediction, count in scores.most_confused(matrix, NUM_PAIRS)
            ],
        }

    def _mistakes(self) -> dict[str, Any] | None:
        """Validation images, so that nobody learns from the test's, the most confident first."""
        if "val" not in self.state.predictions:
            return None
        images, classes = self.run.data.val, self.run.data.classes
        said = self.state.predictions["val"]["prediction"].numpy()
        sure = self.state.predictions["val"]["probability"].numpy()
        wrong = np.flatnonzero(said != images.labels)
        worst = wrong[np.argsort(-sure[wrong], kind="stable")][:NUM_MISTAKES].tolist()
        return {
            "shown": f"{len(worst)} of {len(wrong)} mistakes among {len(images)} validation images",
            "images": [
                {
                    "address": thumbnail(self.run.val_loader.image((EVALUATION, number))),
                    "name": images.name(number),
                    "prediction": f"{classes[said[number]]} {sure[number]:.1%}",
                    "label": classes[images.labels[number]],
                    "short": "/".join(Path(images.name(number)).parts[-2:]),
                }
                for number in worst
            ],
        }

    def _training_images(self) -> list[tuple[str, str]]:
        return [(thumbnail(image), label) for image, label in first_training_images(self.run)]

    def _counts(self) -> list[list[Any]]:
        """Images of each class in each split, and of all."""
        classes = self.run.data.classes
        parts = [np.bincount(self._labels(s), minlength=len(classes)) for s in SPLITS]
        rows = [[name, *numbers] for name, numbers in zip(classes, zip(*parts))]
        return [*rows, ["all", *(part.sum() for part in parts)]]


def first_training_images(run: Run) -> list[tuple[torch.Tensor, str]]:
    """The first images of the first epoch, augmented as that epoch has them, and their classes."""
    loader, labels, classes = run.train_loader, run.data.train.labels, run.data.classes
    keys = loader.keys(1, 0)[:NUM_TRAINING_IMAGES]
    return [(loader.image(key), classes[labels[key[1]]]) for key in keys]


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """An image (C, H, W), uint8 or float in 0..1, as uint8 (H, W, C) with 1 or 3 channels."""
    if image.dtype != torch.uint8:
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    image = image if image.shape[0] in (1, 3) else image[:1]
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def thumbnail(image: torch.Tensor) -> str:
    """The image as a data: address, PNG where it is small and JPEG where it was made smaller."""
    picture = Image.fromarray(as_pixels(image).squeeze())
    small = max(picture.size) <= 48
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "png") if small else picture.save(file, "jpeg", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
