"""A trained model held against labelled images: which ones, what comes out, and is it as reported?"""

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from cnn.datasets.build import Data, read_splits
from cnn.datasets.division import Splits, divide
from cnn.datasets.folder_and_csv import unknown_classes
from cnn.datasets.images import FileImages, Images
from cnn.errors import Refused
from cnn.inference.trained_model import TrainedModel
from cnn.training.losses import build_loss, has_state

logger = logging.getLogger(__name__)

OTHER_DATA = {"data.name", "data.root", "data.args"}  # typed, they may name other data


@dataclass(frozen=True)
class EvaluationData:
    """What is evaluated on."""

    images: Images
    train_labels: np.ndarray | None  # of the run's own data
    description: str

    @property
    def is_own(self) -> bool:
        """Whether they are the images of the run that made the checkpoint, divided as there."""
        return self.train_labels is not None


def choose_images(trained: TrainedModel, split: str) -> EvaluationData:
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
        return EvaluationData(images, own.train.labels, f"{split} of {source}")
    if not trained.typed & OTHER_DATA:
        raise Refused(
            f"{trained.path}: the data have changed since the training ({source}); some of what is"
            f" there now may have been trained on. To evaluate on it all the same, type"
            f" data.root={cfg.root}; to evaluate on other images, data.root=FOLDER"
        )
    if split not in splits and "train" not in splits:
        raise Refused(f"data.root: expected images of {split} or train in {source}, got neither")
    if set(splits) == {"train"}:
        images, description = splits["train"], f"all of {source}"
    else:
        held_out = splits if split in splits else divide(splits, cfg, trained.cfg.seed)
        images, description = held_out[split], f"{split} of {source}"
    if _is_same_place(trained):
        logger.warning(
            "%s has changed since the training, and images that were trained on may be among these",
            source,
        )
    images = _numbered_as(known, classes, images)
    _set_channels(trained, images)
    return EvaluationData(images, None, f"{description}, other data than in training")


def _as_in_training(trained: TrainedModel, splits: Splits, classes: list[str]) -> Data | None:
    """The data divided as in the training, if they are what they were then."""
    if "train" not in splits or classes != trained.classes:
        return None
    try:
        parts = divide(splits, trained.cfg.data, trained.cfg.seed)
    except Refused:  # too few to hold any out
        return None
    data = Data(parts["train"], parts["val"], parts["test"], classes, trained.preprocessing)
    return data if data.fingerprint() == trained.content["data"] else None


def _is_same_place(trained: TrainedModel) -> bool:
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


def _set_channels(trained: TrainedModel, images: Images) -> None:
    """Has files decoded to the model's channels; refuses pixels that have others."""
    wanted = trained.preprocessing.channels
    if isinstance(images, FileImages) and wanted in (1, 3):
        images.files.channels = wanted
    elif images.sizes()[0] != wanted:
        raise Refused(
            f"data.name: expected images of {wanted} channels, as the model was trained on, got"
            f" {images.sizes()[0]}"
        )


def build_loss_of(trained: TrainedModel, subject: EvaluationData) -> nn.Module:
    """The loss of the training, its class weights those of the training images.

    Raises:
        Refused: the checkpoint holds weights that are none.
    """
    cfg, saved = trained.cfg.loss, trained.content.get("class_weights")
    if saved is not None:
        cfg = replace(cfg, class_weights=saved)
    elif cfg.class_weights == "balanced" and not subject.is_own:  # a file of before
        logger.warning("the loss is without class weights, which %s does not tell", trained.path)
        cfg = replace(cfg, class_weights=None)
    loss = build_loss(cfg, subject.train_labels, trained.classes).to(trained.device)
    if has_state(loss):
        try:
            loss.load_state_dict(trained.content.get("loss_state_dict", {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{trained.path}: loss_state_dict does not fit: {error}") from None
    return loss
