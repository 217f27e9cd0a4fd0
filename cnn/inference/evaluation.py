"""The images and the loss function with which a trained model is evaluated."""

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from cnn.config import DataConfig
from cnn.datasets.build import Data, as_trained, read_splits
from cnn.datasets.division import Splits, divide
from cnn.datasets.findings import Findings
from cnn.datasets.images import FileImages, Images
from cnn.datasets.listing import unknown_classes
from cnn.errors import Refused
from cnn.inference.trained_model import TrainedModel
from cnn.training.losses import build_loss, has_state

logger = logging.getLogger(__name__)

OTHER_DATA = {"data.name", "data.root", "data.args"}  # on the command line, they permit other data


@dataclass(frozen=True)
class EvaluationData:
    """Labelled images for the evaluation of a trained model.

    Attributes:
        images: the images. A label is an index into the classes of the model.
        train: the training images. None if `images` come from another dataset.
        description: a text about `images` for messages, such as "test of digits".
    """

    images: Images
    train: Images | None
    description: str

    @property
    def is_same_data(self) -> bool:
        """Whether the images and the model's training images come from the same dataset."""
        return self.train is not None


def choose_images(trained: TrainedModel, split: str) -> EvaluationData:
    """Returns the images on which a trained model is evaluated.

    The images come from the dataset of the training, unless the command line names another dataset.
    All images of another dataset are returned if that dataset has only a split "train".

    Args:
        trained: the model and its settings, including the settings of the command line.
        split: "val" for the validation images, or "test" for the test images.

    Raises:
        Refused: the data cannot be read, have no suitable split, or contain a class that the model
            does not have. Data that have changed since the training are refused, too, unless the
            command line names the data.
    """
    cfg = as_trained(trained.cfg.data, trained.content["data"], trained.preprocessing)
    cfg = replace(cfg, augment=[])  # no pictures are decoded for random crops
    splits, classes = read_splits(cfg, Findings(), trained.classes)
    source = cfg.name if cfg.name not in ("folder", "csv") else cfg.root
    parts = _divide_as_trained(trained, cfg, splits, classes)
    if parts is not None:
        images, train, description = parts[split], parts["train"], f"{split} of {source}"
    elif not trained.typed & OTHER_DATA:
        raise Refused(
            f"{trained.path}: the data in {source} has changed since the training; images that were"
            f" trained on may be among these; type data.root={cfg.root} to use it, or other data"
        )
    else:
        images, description = _choose_other_images(trained, splits, split, source)
        images, train = _with_model_labels(images, classes, trained.classes), None
        description += ", other data than in training"
    set_decoding(trained, images)
    return EvaluationData(images, train, description)


def _divide_as_trained(
    trained: TrainedModel, cfg: DataConfig, splits: Splits, classes: list[str]
) -> Splits | None:
    """Divides a dataset into training, validation and test images as the training did.

    Args:
        trained: the model. The checkpoint of the model contains a checksum of the training's data.
        cfg: the settings with which the data were read.
        splits: the images of the dataset by split, before the division, such as {"train": images}.
        classes: the names of the classes of the dataset.

    Returns:
        The images of the splits "train", "val" and "test". None if the model was trained on other
        data.
    """
    if "train" not in splits or classes != trained.classes:
        return None
    try:
        parts = divide(splits, cfg, trained.cfg.seed, Findings())
    except Refused:  # too few images to hold any out
        return None
    data = Data(parts["train"], parts["val"], parts["test"], classes, trained.preprocessing)
    return parts if trained.content["data"].items() <= data.fingerprint().items() else None


def _choose_other_images(
    trained: TrainedModel, splits: Splits, split: str, source: str
) -> tuple[Images, str]:
    saved, cfg = trained.content["config"]["data"], trained.cfg.data
    if (saved["name"], Path(saved["root"]).resolve()) == (cfg.name, Path(cfg.root).resolve()):
        logger.warning("%s has changed; images that were trained on may be among these", source)
    if set(splits) == {"train"}:
        return splits["train"], f"all of {source}"
    if split not in splits:
        if "train" not in splits:
            raise Refused(f"data.root: expected {split} or train in {source}, got neither")
        splits = divide(splits, replace(cfg, folds=None), trained.cfg.seed, Findings())
    return splits[split], f"{split} of {source}"


def _with_model_labels(images: Images, classes: list[str], model_classes: list[str]) -> Images:
    """Returns a copy of the images with the labels that the model uses.

    A class of the dataset and a class of the model are the same if their names are equal.

    Args:
        images: the images. A label is an index into `classes`.
        classes: the names of the classes of the dataset.
        model_classes: the names of the classes of the model. A label of the result is an index into
            `model_classes`.

    Raises:
        Refused: an image has a class that the model does not have.
    """
    label_of = {name: label for label, name in enumerate(model_classes)}
    unknown = [classes[i] for i in np.unique(images.labels) if classes[i] not in label_of]
    if unknown:
        raise Refused(unknown_classes("data.name: it", unknown, "the model", model_classes))
    images = copy.copy(images)
    images.labels = np.array([label_of.get(name, -1) for name in classes])[images.labels]
    return images


def set_decoding(trained: TrainedModel, images: Images) -> None:
    """Ensures that images have the channels and the range of values that a model takes.

    Image files are decoded as in the training from now on.

    Args:
        trained: the model.
        images: the images. An object for image files is changed in place.

    Raises:
        Refused: the images have another number of channels and cannot be converted.
    """
    channels, value_range = trained.preprocessing.channels, trained.preprocessing.value_range
    if isinstance(images, FileImages):
        images.decode_as(channels, value_range)
    if images.sizes()[0] != channels:
        raise Refused(f"data.name: expected {channels} channels, got {images.sizes()[0]}")


def build_training_loss(trained: TrainedModel, data: EvaluationData) -> nn.Module:
    """Builds the loss function with which a model was trained.

    The class weights come from the checkpoint. An old checkpoint contains no class weights. For an
    old checkpoint with the setting "balanced", the class weights are computed from the training
    labels. If the training labels are not known either, the loss has no class weights.

    Args:
        trained: the model and its checkpoint.
        data: the data of the evaluation, with the training labels if the labels are known.

    Raises:
        Refused: the class weights or the state of the loss in the checkpoint are not valid.
    """
    cfg, saved = trained.cfg.loss, trained.content.get("class_weights")
    if saved is not None:
        cfg = replace(cfg, class_weights=saved)
    elif cfg.class_weights == "balanced" and not data.is_same_data:  # an old checkpoint
        logger.warning("%s has no class weights; the loss is computed without", trained.path)
        cfg = replace(cfg, class_weights=None)
    labels = data.train.labels if data.is_same_data else None
    loss = build_loss(cfg, labels, trained.classes, trained.device)
    if has_state(loss):
        try:
            loss.load_state_dict(trained.content.get("loss_state_dict", {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise Refused(f"{trained.path}: loss_state_dict does not fit: {error}") from None
    return loss
