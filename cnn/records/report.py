"""logs/report.html: a run on one page, complete in itself, without network or script.

The pictures curves.png and confusion_matrix.png are written too. The content comes from the state
and the data of the run. Only the steps at which the run was resumed come from the run's log.
"""

import base64
import functools
import io
import itertools
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cnn.config import as_text, to_yaml
from cnn.datasets.order import EVALUATION
from cnn.datasets.preprocessing import Normalize
from cnn.errors import describe
from cnn.metrics import scores
from cnn.models.cam import grad_cam, overlay
from cnn.records import data_sheet, figures
from cnn.records.evaluation import confusion, intervals_of, panels_of, saved_predictions
from cnn.records.figures import COLOURS, ORANGE, Curve, Panel
from cnn.records.pages import CLASS_HEAD, class_rows, format_metric, render
from cnn.training.run import Run
from cnn.utils.checkpoint import is_end_of_epoch, read_checkpoint, validated_weights
from cnn.utils.files import write_text
from cnn.utils.module_state import load_state, state_preserved
from cnn.utils.outputs import write_output
from cnn.utils.progress import format_duration
from cnn.utils.screen import shorten_name

logger = logging.getLogger(__name__)

NUM_MISTAKES = 24
NUM_TRAINING_IMAGES = 32
NUM_PAIRS = 10  # the most pairs of confused classes
THUMBNAIL = 96  # pixels of the longest side of an embedded image
RESUMED = re.compile(r"==== resumed from .*: epoch \d+, step (\d+), batch")


class Report:
    """The writer of report.html, curves.png and confusion_matrix.png in a run's log folder.

    Args:
        run: the run that the report describes.
    """

    def __init__(self, run: Run):
        self.logs, self.run, self.state = run.folder.logs, run, run.state
        self._evaluated = [split for split in ("val", "test") if saved_predictions(run, split)]

    def write(self) -> None:
        """Writes report.html, a page about the present state of the run.

        An existing file is replaced.
        """
        write_text(self.logs.report, render("report.jinja", **self._content()))

    def write_pictures(self) -> None:
        """Writes the pictures curves.png, confusion_matrix.png and roc.png.

        After the final test, the last two are of the test. Before the test, they are of the best
        epoch's validation. Without predictions, they are not written.
        """
        write_output(self.logs.curves, figures.png(figures.draw_panels, self._panels()))
        for split in self._evaluated[-1:]:  # the test, if there is one
            write_output(self.logs.confusion_matrix, confusion_png(self.run, split))
            if panels := panels_of(self.run, split):
                write_output(self.logs.roc, figures.png(figures.draw_panels, panels))

    # -- from the state -------------------------------------------------------------------------

    def _panels(self) -> list[Panel]:
        history = self.state.history
        epochs, marks = [row["epoch"] for row in history], self._resumed_at()
        charts = {
            "Loss": ["train_loss", "val_loss"],
            "Accuracy": ["train_acc", "val_acc"],
            "AUC": [name for name in history[-1] if name == "val_auc"],
            "Learning rate": [name for name in history[-1] if name.partition("_")[0] == "lr"],
        }
        panels = []
        for title, names in charts.items():
            curves = []
            for number, name in enumerate(names):
                label = name if name.startswith("lr") else name.partition("_")[0]
                colour = ORANGE if label == "val" else COLOURS[number % len(COLOURS)]
                curves.append(Curve(label, epochs, [row.get(name) for row in history], colour))
            if curves:
                panels.append(Panel(title, curves, marks))
        return panels

    def _resumed_at(self) -> list[float]:
        """Returns the points at which the run was resumed, in epochs.

        A resume in the middle of the third epoch is the point 2.5. The points are read from the
        run's log file.
        """
        path = self.logs.log
        log = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        steps = {int(step) for step in RESUMED.findall(log)}
        per_epoch, now = self.state.schedule.steps_per_epoch, self.state.step
        return sorted(step / per_epoch for step in steps if step < now)

    # -- the page -------------------------------------------------------------------------------

    def _content(self) -> dict[str, Any]:
        """Returns the value of each variable in the template report.jinja."""
        cfg, history, data = self.run.cfg, self.state.history, self.run.data
        columns = list(history[-1])
        training = first_training_images(self.run)
        return self._headline() | {
            "title": f"{cfg.run + ': ' if cfg.run else ''}{cfg.model.name} on {cfg.data.name}",
            "curves": figures.panel_svgs(self._panels()),
            "evaluations": [self._evaluation(split) for split in self._evaluated],
            "test": self.state.test,
            "class_head": CLASS_HEAD,
            "mistakes": [self._mistakes(split) for split in self._evaluated],
            "training": [(thumbnail(image), name) for image, name in training],
            "augmentations": as_text(cfg.data.augment)[1:-1] or "none",
            "counts": data_sheet.class_table(data),
            "facts": list(data_sheet.facts(self.run).items()),
            "findings": data.findings.found.items(),
            "columns": columns,
            "epochs": [[format_metric(row.get(name)) for name in columns] for row in history],
            "environment": list(self.run.environment.items()),
            "config": to_yaml(cfg),
        }

    def _headline(self) -> dict[str, Any]:
        """Returns the values that the top of the report shows.

        The values are the results, the progress, and the command that repeats the training. A
        further value is the accuracy of always predicting the most frequent class.

        Returns:
            The value of each variable in the template report.jinja for the top of the report.
        """
        state, data = self.state, self.run.data
        split = "val" if state.test is None else "test"
        labels = data.splits[split].labels
        majority = int(np.bincount(data.train.labels, minlength=len(data.classes)).argmax())
        val_acc = state.best and state.history[state.best["epoch"] - 1]["val_acc"]
        test_acc = state.test and state.test["test_acc"]
        ends = {name: intervals_of(self.run, name).get("acc") for name in ("val", "test")}
        return {
            "best": state.best,
            "val_acc": state.best and scores.with_interval(val_acc, ends["val"]),
            "test_acc": state.test and scores.with_interval(test_acc, ends["test"]),
            "num_val": len(data.val),
            "majority": data.classes[majority],
            "majority_acc": f"{(labels == majority).mean():.4f} of {len(labels)} {split} images",
            "progress": f"{state.epoch} of {self.run.cfg.train.epochs} epochs",
            "time": format_duration(sum(row["seconds"] for row in state.history)),
            "command": shlex.join(["python", "train.py", "--config", self.logs.config.as_posix()]),
            "commit": self.run.environment["git"],
        }

    def _evaluation(self, split: str) -> dict[str, Any]:
        """Returns the values that the report shows about an evaluation.

        The values are the confusion matrix, the most frequent confusions and the metrics per class.

        Args:
            split: "val" for the validation of the best epoch, or "test" for the final test.

        Returns:
            A dict from the names in the template report.jinja to the values.
        """
        matrix, classes = confusion(self.run, split), self.run.data.classes
        rows, means = class_rows(matrix, classes)
        names = [shorten_name(name) for name in classes]
        ends, test = intervals_of(self.run, split), self.state.test or {}
        return {
            "split": split,
            "num_images": matrix.sum(),
            "figures": [
                (name[5:], scores.with_interval(value, ends.get(name[5:])))
                for name, value in test.items()
            ],
            "is_small": len(classes) <= figures.MAX_CLASSES_WITH_NUMBERS,
            "matrix": figures.svg(figures.draw_confusion, matrix, classes),
            "charts": figures.panel_svgs(panels_of(self.run, split)),
            "rows": rows,
            "means": means,
            "confused": [
                [names[label], names[prediction], f"{count} of {matrix[label].sum()}"]
                for label, prediction, count in scores.most_confused(matrix, NUM_PAIRS)
            ],
        }

    def _mistakes(self, split: str) -> dict[str, Any]:
        """Returns the worst mistakes of the best epoch on the images of a split.

        The worst mistakes are the wrong predictions with the highest probabilities.

        Args:
            split: "val" or "test".

        Returns:
            A dict with four entries. The entry "total" is the number of all mistakes. The entry
            "num_images" is the number of images, and "split" the word for them. The entry "images"
            is a list of at most 24 dicts, the worst mistake first. Each dict describes a mistake
            and its image.
        """
        images, classes = self.run.data.splits[split], self.run.data.classes
        loader = self.run.test_loader if split == "test" else self.run.val_loader
        saved = saved_predictions(self.run, split)
        predictions, confidences = saved["prediction"], saved["probability"]
        wrong = np.flatnonzero(predictions != images.labels)
        worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:NUM_MISTAKES].tolist()
        pictures = [loader.image((EVALUATION, number)) for number in worst]
        maps = self._maps(pictures, predictions[worst])
        return {
            "split": "test" if split == "test" else "validation",
            "total": len(wrong),
            "num_images": len(images),
            "images": [
                {
                    "address": thumbnail(picture),
                    "map": thumbnail(seen) if seen is not None else None,
                    "name": images.name(number),
                    "prediction": f"{classes[predictions[number]]} {confidences[number]:.1%}",
                    "label": classes[images.labels[number]],
                    "short": "/".join(Path(images.name(number)).parts[-2:]),
                }
                for number, picture, seen in itertools.zip_longest(worst, pictures, maps)
            ],
        }

    @functools.cached_property
    def _best_weights(self) -> dict[str, Any] | None:
        """The weights of the best epoch; None if best.pth is of another epoch or run."""
        content = read_checkpoint(self.run.folder.best)
        position = self.run.metadata["started"], self.state.best["epoch"]
        return validated_weights(content) if is_end_of_epoch(content, *position) else None

    def _maps(self, pictures: list[torch.Tensor], classes: np.ndarray) -> list[torch.Tensor]:
        """Returns pictures with maps of where the best epoch's model sees the classes.

        Args:
            pictures: the pictures, each (C, size, size).
            classes: the index of a class for each picture, an array (N).

        Returns:
            A list of the pictures, uint8 (3, size, size). [] before the end of the run, for a model
            that has no such maps, or if the weights of the best epoch are not in best.pth.
        """
        run, best = self.run, self.state.best
        if not pictures or best is None or self.state.test is None:
            return []
        model, device = self.state.evaluated_model(), self.state.device
        try:
            if self._best_weights is None:
                return []
            batch = Normalize(run.data.preprocessing, device)(torch.stack(pictures).to(device))
            with state_preserved(model), run.autocast():
                load_state(model.eval(), self._best_weights)
                maps = grad_cam(model, batch, torch.from_numpy(classes).to(device))
        except Exception as error:  # noqa: BLE001  the user's code; the report is worth more
            logger.info("report.html is without Grad-CAM: %s", describe(error))
            return []
        pixels = (torch.from_numpy(as_pixels(picture)).permute(2, 0, 1) for picture in pictures)
        return list(map(overlay, pixels, maps))


def confusion_png(run: Run, split: str) -> bytes:
    """Draws the confusion matrix of an evaluation, and returns the bytes of a PNG file.

    Args:
        run: the run, whose state has the predictions of the evaluation.
        split: "val" for the validation of the best epoch, or "test" for the final test.
    """
    title = "test" if split == "test" else f"validation, epoch {run.state.best['epoch']}"
    return figures.png(figures.draw_confusion, confusion(run, split), run.data.classes, title)


def first_training_images(run: Run) -> list[tuple[torch.Tensor, str]]:
    """Returns the first augmented training images of epoch 1, with their class names.

    Args:
        run: the run whose data is used.

    Returns:
        At most 32 pairs. A pair is an image, of shape (channels, height, width), and a class name.
    """
    loader, labels, classes = run.train_loader, run.data.train.labels, run.data.classes
    keys = loader.keys(1, 0)[:NUM_TRAINING_IMAGES]
    return [(loader.image(key), classes[labels[key[1]]]) for key in keys]


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """Converts an image tensor to an array of pixels.

    Args:
        image: uint8, or float from 0 to 1, of shape (channels, height, width). A float below 0 or
            above 1 is clipped.

    Returns:
        A uint8 array (height, width, channels). If the image has neither 1 nor 3 channels, only the
        first channel is kept.
    """
    if image.dtype != torch.uint8:
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    image = image if image.shape[0] in (1, 3) else image[:1]
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def thumbnail(image: torch.Tensor) -> str:
    """Encodes an image as the text of a data: URL for an HTML page.

    An image of at most 48 pixels per side becomes a PNG of the same size. A larger image becomes a
    JPEG of at most 96 pixels per side.

    Args:
        image: uint8, or float from 0 to 1, of shape (channels, height, width).
    """
    picture, file = Image.fromarray(as_pixels(image).squeeze()), io.BytesIO()
    kind = "png" if max(picture.size) <= 48 else "jpeg"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, kind, quality=85)  # only a JPEG has a quality
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
