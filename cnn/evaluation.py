"""A trained model held against labelled images: which ones, what comes out, and is it as reported?"""

import copy
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cnn import config, scores
from cnn.config import Refused
from cnn.datasets import Data, Splits, divide, read_splits
from cnn.datasets.folder import unknown_classes
from cnn.datasets.images import FileImages, Images
from cnn.losses import build_loss
from cnn.report import CLASS_HEAD, class_rows
from cnn.scores import with_interval
from cnn.trained import Trained
from cnn.utils import environment as env
from cnn.utils.checkpoint import read_checkpoint
from cnn.utils.screen import aligned, printable

logger = logging.getLogger(__name__)

OTHER_DATA = {"data.name", "data.root", "data.args"}  # typed, they may name other data
MAX_ROWS = 40  # classes on the screen
MAX_PAIRS = 5  # of classes mixed up


@dataclass(frozen=True)
class Subject:
    """What is evaluated on."""

    images: Images
    train_labels: np.ndarray | None  # of the run's own data
    about: str

    @property
    def is_own(self) -> bool:
        """Whether they are the images of the run that made the checkpoint, divided as there."""
        return self.train_labels is not None


def choose_images(trained: Trained, split: str) -> Subject:
    """The split of the run's own data; of other data that split, or where they have none, all.

    Nothing of other data was trained on, so that nothing has to be held out.

    Raises:
        Refused: the data cannot be had, have other classes, or have changed since the training.
    """
    cfg, known = trained.cfg.data, trained.classes
    splits, classes = read_splits(cfg, known)
    own = _as_in_training(trained, splits, classes)
    source = cfg.name if cfg.name not in ("folder", "csv") else cfg.root
    if own is not None:
        images = getattr(own, split)
        _set_channels(trained, images)
        return Subject(images, own.train.labels, f"{split} of {source}")
    if not trained.typed & OTHER_DATA:
        raise Refused(
            f"{trained.path}: the data have changed since the training ({source}); some of what is"
            f" there now may have been trained on. To evaluate on it all the same, type"
            f" data.root={cfg.root}; to evaluate on other images, data.root=FOLDER"
        )
    if split not in splits and "train" not in splits:
        raise Refused(f"data.root: expected images of {split} or train in {source}, got neither")
    if set(splits) == {"train"}:
        images, about = splits["train"], f"all of {source}"
    else:
        held_out = splits if split in splits else divide(splits, cfg, trained.cfg.seed)
        images, about = held_out[split], f"{split} of {source}"
    if _is_same_place(trained):
        logger.warning(
            "%s has changed since the training, and images that were trained on may be among these",
            source,
        )
    images = _numbered_as(known, classes, images)
    _set_channels(trained, images)
    return Subject(images, None, f"{about}, other data than in training")


def _as_in_training(trained: Trained, splits: Splits, classes: list[str]) -> Data | None:
    """The data divided as in the training, if they are what they were then."""
    if "train" not in splits or classes != trained.classes:
        return None
    try:
        parts = divide(splits, trained.cfg.data, trained.cfg.seed)
    except Refused:  # too few to hold any out
        return None
    data = Data(parts["train"], parts["val"], parts["test"], classes, trained.preprocessing)
    return data if data.fingerprint() == trained.content["data"] else None


def _is_same_place(trained: Trained) -> bool:
    then, now = trained.content["config"]["data"], trained.cfg.data
    return (then["name"], Path(then["root"]).resolve()) == (now.name, Path(now.root).resolve())


def _numbered_as(known: list[str], classes: list[str], images: Images) -> Images:
    """The images with the model's numbers for their classes, which go by name."""
    present = np.unique(images.labels).tolist()
    unknown = [classes[number] for number in present if classes[number] not in known]
    if unknown:
        raise Refused(unknown_classes("data.name", unknown, known))
    numbers = np.array([known.index(name) if name in known else -1 for name in classes])
    images = copy.copy(images)
    images.labels = numbers[images.labels]
    return images


def _set_channels(trained: Trained, images: Images) -> None:
    """Has files decoded to the model's channels; refuses pixels that have others."""
    wanted = trained.preprocessing.channels
    if isinstance(images, FileImages) and wanted in (1, 3):
        images.files.channels = wanted
    elif images.sizes()[0] != wanted:
        raise Refused(
            f"data.name: expected images of {wanted} channels, as the model was trained on, got"
            f" {images.sizes()[0]}"
        )


def build_loss_of(trained: Trained, subject: Subject) -> nn.Module:
    """The loss of the training, its class weights those of the training images.

    Raises:
        Refused: the checkpoint holds weights that are none.
    """
    cfg, saved = trained.cfg.loss, trained.content.get("class_weights")
    number = len(trained.classes)
    if saved is not None:
        if not (isinstance(saved, list) and all(type(weight) is float for weight in saved)):
            raise Refused(f"{trained.path}: class_weights: expected {number} numbers")
        cfg = replace(cfg, class_weights=saved)
    elif cfg.class_weights == "balanced" and not subject.is_own:  # a file of before
        logger.warning("the loss is without class weights, which %s does not tell", trained.path)
        cfg = replace(cfg, class_weights=None)
    loss = build_loss(cfg, subject.train_labels, trained.classes).to(trained.device)
    if config.is_import_path(cfg.name):
        try:
            loss.load_state_dict(trained.content.get("loss_state_dict", {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{trained.path}: loss_state_dict does not fit: {error}") from None
    return loss


# -- what training reported ------------------------------------------------------------------------


def reported(trained: Trained, split: str) -> dict[str, float | None] | None:
    """What training reported of these very weights, or None where it has not measured them."""
    content = trained.content
    if trained.is_within_epoch:
        return None
    if split == "val":
        row = content["history"][-1] if content["history"] else {}
        measured = row.get("epoch") == content["epoch"]
        return {k: v for k, v in row.items() if k.startswith("val_")} if measured else None
    if content["test"] is None:  # best.pth is from before the test, last.pth from after it
        try:
            content = read_checkpoint(trained.path.with_name("last.pth"))
        except Refused:
            return None
        if content["started"] != trained.content["started"]:
            return None
    best = content["best"]
    is_best = best is None or best["epoch"] == trained.content["epoch"]
    return content["test"] if is_best else None


def verdict(trained: Trained, metrics: dict[str, float | None], split: str) -> str | None:
    """Whether the figures are those that training reported; None where it reported none."""
    before = reported(trained, split)
    if before is None:
        return None
    differing = [name for name in before if name in metrics and before[name] != metrics[name]]
    if not differing:
        return "training reported the same figures, to the last digit"
    changes = env.differences(
        trained.content["environment"], env.describe(trained.device, trained.precision)
    )
    then, now = trained.content["config"]["data"]["batch_size"], trained.cfg.data.batch_size
    changes += [f"data.batch_size {then} → {now}"] if then != now else []
    reason = f"{', '.join(changes)}: equal up to rounding" if changes else "has the code changed?"
    figures = ", ".join(f"{name} {before[name]}, now {metrics[name]}" for name in differing)
    return f"training reported {figures} ({reason})"


# -- what is shown ---------------------------------------------------------------------------------


def as_text(metrics: dict[str, float | None], matrix: np.ndarray, classes: list[str]) -> str:
    """Figures, a row a class, and what is mixed up most."""
    names = [printable(name) for name in classes]
    lines = aligned([[name, _shown(name, value, matrix)] for name, value in metrics.items()])
    if len(classes) == 2:
        lines.append(f"positive: {names[1]}")
    rows, means = class_rows(matrix, names)
    if len(rows) > MAX_ROWS:
        worst = np.argsort(np.nan_to_num(scores.per_class(matrix)["f1"], nan=2), kind="stable")
        rows = [rows[number] for number in worst[:MAX_ROWS]]
        means.append([f"({MAX_ROWS} of {len(classes)} classes, the worst)", *[""] * 5])
    lines += ["", *aligned([CLASS_HEAD, *rows, *means], right=range(1, len(CLASS_HEAD)))]
    mixed = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    cells = np.argsort(-mixed, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = [[str(mixed[divmod(int(cell), len(classes))]), *divmod(int(cell), len(classes))]
             for cell in cells if mixed.flat[cell]]  # fmt: skip
    if pairs:
        lines += ["", "most mixed up"]
        lines += aligned(
            [[f"  {names[is_]}", f"taken for {names[said]}", f"{count} of {matrix[is_].sum()}"]
             for count, is_, said in pairs]
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float | None, matrix: np.ndarray) -> str:
    if name in ("val_acc", "test_acc"):
        return with_interval(value, int(matrix.sum()))
    return "n/a" if value is None else f"{value:.4f}"


def as_json(
    trained: Trained,
    subject: Subject,
    split: str,
    metrics: dict[str, float | None],
    matrix: np.ndarray,
) -> str:
    """All of it, every digit; what is undefined is null."""
    values = scores.per_class(matrix)
    values["images"] = values.pop("support")
    content, number = trained.content, int(matrix.sum())
    return (
        json.dumps(
            {
                "checkpoint": str(trained.path),
                "epoch": content["epoch"],
                "step": content["step"],
                "model": trained.cfg.model.name,
                "data": {"name": trained.cfg.data.name, "root": trained.cfg.data.root},
                "split": split,
                "images": number,
                "own_data": subject.is_own,
                "metrics": {name: _plain(value) for name, value in metrics.items()},
                "acc_interval": scores.wilson(matrix.trace().item(), number),
                "reported": reported(trained, split) if subject.is_own else None,
                "classes": [
                    {"class": name} | {key: _plain(v[row]) for key, v in values.items()}
                    for row, name in enumerate(trained.classes)
                ],
                "confusion_matrix": matrix.tolist(),
                "environment": env.describe(trained.device, trained.precision),
            },
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        + "\n"
    )


def _plain(value: Any) -> float | int | None:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value is None or not math.isfinite(value) else value
