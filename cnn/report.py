"""logs/report.html: a run on one page that is complete in itself, without network or script.

Beside it curves.png and confusion_matrix.png. Everything shown is made from the run's state and
data, but where it was resumed, which the log knows.
"""

import base64
import io
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnn import figures, scores
from cnn.building import Run
from cnn.config import Config, to_yaml
from cnn.datasets.loading import EVALUATION
from cnn.figures import BLUE, ORANGE, Curve
from cnn.pages import details, escaped, page, shown, table
from cnn.utils.files import write_atomically, write_text
from cnn.utils.progress import duration

NUM_MISTAKES = 24
NUM_TRAINING_IMAGES = 32
NUM_PAIRS = 10  # of classes that are mixed up most
SPLITS = ("train", "val", "test")
CLASS_HEAD = ["class", "precision", "recall", "specificity", "F1", "images"]
THUMBNAIL = 96  # the longest side in pixels that is embedded
RESUMED = re.compile(r"==== resumed from .*: epoch \d+, step (\d+), batch")


class Report:
    """Writes the page and the two pictures; remembers what it need not draw again."""

    def __init__(self, cfg: Config, folder, run: Run):
        self.cfg, self.logs, self.run, self.state = cfg, folder.logs, run, run.state
        self._drawn: dict[str, tuple[object, str]] = {}

    def write(self) -> None:
        """Replaces the page by one of the run as it stands."""
        text = self._page(self._panels(), self._resumes())
        write_text(self.logs / "report.html", text.encode("utf-8", "replace").decode())

    def write_pictures(self) -> None:
        """curves.png and confusion_matrix.png, of the test or, before it, the best epoch."""
        picture = figures.curves_png(self._panels(), self._resumes())
        write_atomically(self.logs / "curves.png", lambda file: file.write(picture))
        split = "test" if "test" in self.state.predictions else "val"
        if split in self.state.predictions:
            title = "test" if split == "test" else f"validation, epoch {self.state.best['epoch']}"
            matrix = self._confusion(split)
            matrix_picture = figures.confusion_png(matrix, self.run.data.classes, title)
            path = self.logs / "confusion_matrix.png"
            write_atomically(path, lambda file: file.write(matrix_picture))

    def _once(self, what: str, make) -> str:
        """What `make` gives, made anew only where there is another best epoch or a test."""
        now = (self.state.best and self.state.best["epoch"], self.state.test is not None)
        if self._drawn.get(what, (None, ""))[0] != now:
            self._drawn[what] = (now, make() or "")
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
            log = (self.logs / "train.log").read_text(encoding="utf-8", errors="replace")
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

    def _page(self, panels: list[tuple[str, list[Curve]]], marks: list[float]) -> str:
        cfg = self.cfg
        title = f"{cfg.run + ': ' if cfg.run else ''}{cfg.model.name} on {cfg.data.name}"
        curves = "".join(
            f"<div>{figures.curves_svg(name, curves, marks)}</div>" for name, curves in panels
        )
        sections = [
            ("result", "", self._headline()),
            ("curves", "Curves", f'<div class="row">{curves}</div>'),
            *(self._of_split(split) for split in ("val", "test")),
            ("mistakes", "The surest mistakes", self._once("mistakes", self._mistakes)),
            ("training", "Training images, as the model gets them", self._once_ever("training")),
            ("counts", "Images", self._counts()),
            ("epochs", "", details("Every epoch", self._epochs())),
            ("environment", "", details("Environment", self._environment())),
            ("config", "", details("Configuration", f"<pre>{escaped(to_yaml(cfg))}</pre>")),
        ]
        body = "\n".join(
            f'<section id="{name}">{f"<h2>{head}</h2>" if head else ""}{content}</section>'
            for name, head, content in sections
            if content
        )
        return page(title, body)

    def _headline(self) -> str:
        state, data = self.state, self.run.data
        best, counts = state.best, np.bincount(data.train.labels, minlength=len(data.classes))
        usual = int(counts.argmax())
        lines, result = [], "no result yet"

        def baseline(split: str) -> str:
            labels = self._labels(split)
            name, share = escaped(data.classes[usual]), float((labels == usual).mean())
            return f"always saying “{name}”, the most frequent in training: {share:.4f}"

        if best is not None:
            number, row = len(data.val), state.history[best["epoch"] - 1]
            result = f"validation accuracy {scores.with_interval(row['val_acc'], number)}"
            lines.append(f"best epoch {best['epoch']} by {best['metric']} {best['value']:.4f}")
        if state.test is not None:
            lines.append(f"{result}, {len(data.val)} images it was chosen by")
            number = len(data.test)
            result = f"test accuracy {scores.with_interval(state.test['test_acc'], number)}"
        split = "test" if state.test is not None else "val"
        lines.append(f"{baseline(split)} of {len(self._labels(split))} {split} images")
        stand = "tested" if state.test is not None else "not yet tested"
        seconds = sum(row["seconds"] for row in state.history)
        lines.append(
            f"{state.epoch} of {self.cfg.train.epochs} epochs, {stand}; {duration(seconds)}"
        )
        number, _, interval = result.partition(" (")
        small = f' <span class="dim" style="font-size:1rem">({interval}</span>' if interval else ""
        settings = (self.logs / "config.yaml").as_posix()
        command = shlex.join(["python", "train.py", "--config", settings])
        commit = self.run.environment["git"]
        note = f"  # at git commit {commit}" if commit else ""
        return (
            f'<p class="result">{number}{small}</p>'
            + "".join(f"<p>{line}</p>" for line in lines)
            + f"<pre>{escaped(command + note)}</pre>"
        )

    def _of_split(self, split: str) -> tuple[str, str, str]:
        """Confusion matrix and table of a split's predictions."""
        if split not in self.state.predictions:
            return split, "", ""
        number = len(self._labels(split))
        head = f"Test, {number} images"
        if split == "val":
            head = f"Validation, {number} images, epoch {self.state.best['epoch']}"
        return split, head, self._once(split, lambda: self._judged(split))

    def _judged(self, split: str) -> str:
        """What the predictions come to: figures, matrix, what is mixed up most, every class."""
        matrix, classes = self._confusion(split), self.run.data.classes
        lines = []
        if split == "test":
            metrics = self.state.test.items()
            lines.append(
                " · ".join(
                    f"{name.removeprefix('test_')} {shown(value)}" for name, value in metrics
                )
            )
        if len(classes) == 2:
            lines.append(f"positive: {classes[1]}")
        said = "".join(f"<p>{escaped(line)}</p>" for line in lines)
        picture = figures.confusion_svg(matrix, classes)
        rows, means = class_rows(matrix, classes)
        if len(classes) <= figures.MAX_CLASSES_WITH_NUMBERS:
            content = f'<div class="wide">{table(CLASS_HEAD, rows + means)}</div>'
            return f'{said}<div class="row"><div>{picture}</div>{content}</div>'
        every = details("Every class", f'<div class="wide">{table(CLASS_HEAD, rows)}</div>')
        return (
            f'{said}<div class="row"><div class="wide">{table(CLASS_HEAD, means)}</div>'
            f'<div class="wide">{most_confused(matrix, classes)}</div></div>'
            f'{every}<div class="wide scroll">{picture}</div>'
        )

    def _mistakes(self) -> str:
        """Validation images, so that nobody learns from the test's, the surest first."""
        if "val" not in self.state.predictions:
            return ""
        images, classes = self.run.data.val, self.run.data.classes
        said = self.state.predictions["val"]["prediction"].numpy()
        sure = self.state.predictions["val"]["probability"].numpy()
        wrong = np.flatnonzero(said != images.labels)
        if not len(wrong):
            return "<p>There is none among the validation images.</p>"
        worst = wrong[np.argsort(-sure[wrong], kind="stable")][:NUM_MISTAKES]
        cells = []
        for number in worst.tolist():
            name = images.name(number)
            image = self.run.val_loader.image((EVALUATION, number))
            cells.append(
                f'<figure><img src="{thumbnail(image)}" alt="" title="{escaped(name)}">'
                f"<figcaption>{escaped(classes[said[number]])} {sure[number]:.1%}<br>"
                f"<small>is {escaped(classes[images.labels[number]])}<br>"
                f"{escaped('/'.join(Path(name).parts[-2:]))}</small></figcaption></figure>"
            )
        shown_of = f"{len(worst)} of {len(wrong)} mistakes among {len(images)} validation images"
        return f'<p class="dim">{shown_of}</p><div class="images">{"".join(cells)}</div>'

    def _once_ever(self, what: str) -> str:
        if what not in self._drawn:
            self._drawn[what] = (None, self._training_images())
        return self._drawn[what][1]

    def _training_images(self) -> str:
        cells = [
            f'<figure><img src="{thumbnail(image)}" alt=""><figcaption><small>'
            f"{escaped(label)}</small></figcaption></figure>"
            for image, label in first_training_images(self.run)
        ]
        changes = ", ".join(self.cfg.data.augment) or "none"
        return (
            f'<p class="dim">the first of epoch 1; changes: {escaped(changes)}</p>'
            f'<div class="images small">{"".join(cells)}</div>'
        )

    def _counts(self) -> str:
        data = self.run.data
        parts = [np.bincount(self._labels(s), minlength=len(data.classes)) for s in SPLITS]
        rows = [
            [name, *(f"{part[number]}" for part in parts)]
            for number, name in enumerate(data.classes)
        ]
        rows.append(["all", *(f"{part.sum()}" for part in parts)])
        content = f'<div class="wide">{table(["class", *SPLITS], rows)}</div>'
        return content if len(rows) <= 30 else details("of every class", content)

    def _epochs(self) -> str:
        names = list(self.state.history[-1])
        rows = [[shown(row.get(name)) for name in names] for row in self.state.history]
        return f'<div class="wide">{table(names, rows)}</div>'

    def _environment(self) -> str:
        rows = [[key, str(value)] for key, value in self.run.environment.items()]
        return f'<div class="wide">{table(["", ""], rows)}</div>'


def class_rows(matrix: np.ndarray, classes: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Table rows for each class, and for the means over them."""
    values = scores.per_class(matrix)
    support = values.pop("support")
    rows = [
        [name, *(shown(column[number]) for column in values.values()), f"{support[number]}"]
        for number, name in enumerate(classes)
    ]
    macro = [scores.macro(column) for column in values.values()]
    weighted = [scores.weighted(column, support) for column in values.values()]
    means = [
        [name, *map(shown, figures_), f"{support.sum()}"]
        for name, figures_ in (("mean", macro), ("weighted", weighted))
    ]
    return rows, means


def most_confused(matrix: np.ndarray, classes: list[str]) -> str:
    """The pairs of classes that are mixed up most often, as a table."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    most = np.argsort(-wrong, axis=None, kind="stable")[:NUM_PAIRS]
    pairs = [divmod(int(cell), len(classes)) for cell in most]
    rows = [
        [
            figures.shortened(classes[is_]),
            figures.shortened(classes[said]),
            f"{matrix[is_, said]} of {matrix[is_].sum()}",
        ]
        for is_, said in pairs
        if wrong[is_, said]
    ]
    return table(["most mixed up", "taken for", "images"], rows)


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
