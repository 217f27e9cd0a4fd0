"""The datasets by name, and the steps from a name to training, validation and test images."""

import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cnn.config import DataConfig, is_import_path
from cnn.datasets import digits, folder_and_csv, synthetic, torchvision_datasets
from cnn.datasets.division import Splits, divide
from cnn.datasets.images import FileImages, Images, UserImages
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.utils.importing import import_object

logger = logging.getLogger(__name__)

DEFAULT_IMAGE_SIZE = 224  # for images of several sizes, where the user sets none


def _load_synthetic(cfg: DataConfig, _) -> tuple[Splits, list[str]]:
    try:
        return synthetic.load(**cfg.args)
    except (ValueError, IndexError, MemoryError, OverflowError) as error:
        raise Refused(f"data.args: synthetic cannot be made of {cfg.args}: {error}") from None


# Each loads the splits that exist and the names of the classes. The second argument are the classes
# of a model to evaluate, or None; datasets with classes of their own ignore it.
DATASETS: dict[str, Callable[[DataConfig, list[str] | None], tuple[Splits, list[str]]]] = {
    "digits": lambda *_: digits.load(),
    "synthetic": _load_synthetic,
    **{
        name: lambda cfg, _, name=name: torchvision_datasets.load(name, cfg.root, cfg.download)
        for name in torchvision_datasets.FILES
    },
    "folder": lambda cfg, classes: folder_and_csv.load_folder(cfg.root, cfg.on_bad_image, classes),
    "csv": lambda cfg, classes: folder_and_csv.load_csv(cfg.root, cfg.on_bad_image, classes),
}


@dataclass(frozen=True)
class Data:
    """The images of a run, divided, with the names of their classes and their preprocessing."""

    train: Images
    val: Images
    test: Images
    classes: list[str]
    preprocessing: Preprocessing

    def with_preprocessing(self, preprocessing: Preprocessing) -> "Data":
        """Returns the same data with the preprocessing that a model was trained with."""
        return replace(self, preprocessing=preprocessing)

    def head(self, number: int) -> "Data":
        """Returns the first `number` images of each split."""
        splits = (self.train, self.val, self.test)
        cut = [images.subset(np.arange(min(number, len(images)))) for images in splits]
        cut = [images.detached() if isinstance(images, FileImages) else images for images in cut]
        return Data(*cut, self.classes, self.preprocessing)

    def fingerprint(self) -> dict[str, int]:
        """Returns the number of images per split, and a checksum of their names and pixels."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        checksum = self.train.checksum()
        for images in splits.values():
            names = "\0".join(
                images.name(i).replace("\\", "/").rsplit("/", 1)[-1] for i in range(len(images))
            )
            checksum = zlib.crc32(os.fsencode(names), zlib.crc32(images.labels.tobytes(), checksum))
        return {split: len(images) for split, images in splits.items()} | {"checksum": checksum}


def build_data(cfg: DataConfig, seed: int) -> Data:
    """Reads a dataset and divides it into training, validation and test images.

    A missing test or validation set is held out of the training images, stratified by class, as a
    function of the seed. Mean and std are those of the training images.

    Raises:
        Refused: the data cannot be read or cannot be divided.
    """
    splits, classes = read_splits(cfg)
    splits = divide(splits, cfg, seed)
    for split, images in splits.items():
        present = set(images.labels.tolist())
        absent = [name for number, name in enumerate(classes) if number not in present]
        if absent:
            logger.warning("%s has no image of: %s", split, ", ".join(absent[:20]))
    preprocessing = _choose_preprocessing(cfg, splits["train"])
    return Data(splits["train"], splits["val"], splits["test"], classes, preprocessing)


def read_splits(
    cfg: DataConfig, model_classes: list[str] | None = None
) -> tuple[Splits, list[str]]:
    """Reads a dataset with the splits that it comes with, and the names of its classes.

    Args:
        model_classes: the classes of a model to evaluate; folders and CSV files then use these.

    Raises:
        Refused: the data cannot be read.
    """
    is_own = is_import_path(cfg.name)
    try:
        if not is_own:
            return DATASETS[cfg.name](cfg, model_classes)
        found = import_object(cfg.name, "data.name")(root=cfg.root, **cfg.args)
    except TypeError as error:  # a keyword that the function does not take
        raise Refused(f"data.args: {cfg.name}: {error}") from error
    return _check_user_dataset(cfg, found)


def _check_user_dataset(cfg: DataConfig, found: Any) -> tuple[Splits, list[str]]:
    if not isinstance(found, dict) or "train" not in found or "classes" not in found:
        expected = "to return a dict with train, classes and, optionally, val and test"
        raise Refused(f"data.name: expected {cfg.name} {expected}, got {type(found).__name__}")
    classes = [str(name) for name in found["classes"]]
    if len(set(classes)) < len(classes):
        raise Refused(f"data.name: {cfg.name}: expected classes that differ, got {classes[:9]}")
    splits: Splits = {}
    for split in ("train", "val", "test"):
        if found.get(split) is not None:
            images = splits[split] = UserImages(found[split], f"{cfg.name} {split}")
            if not ((images.labels >= 0) & (images.labels < len(classes))).all():
                raise Refused(f"data.name: {split}: expected labels 0 to {len(classes) - 1}")
    return splits, classes


def _choose_preprocessing(cfg: DataConfig, train: Images) -> Preprocessing:
    """Returns the configured image size and channels, or the images' own, with mean and std."""
    channels, smallest, largest = train.sizes()
    if cfg.channels in (1, 3) and isinstance(train, FileImages):
        channels = train.files.channels = cfg.channels
    elif cfg.channels not in (None, channels):
        raise Refused(f"data.channels: {cfg.name} has {channels}, got {cfg.channels}")
    image_size = cfg.image_size or (largest if smallest == largest else DEFAULT_IMAGE_SIZE)
    if cfg.image_size is None and smallest != largest:
        sides = f"images have sides of {smallest} to {largest} pixels"
        logger.info(f"{sides}; resized and cropped to {image_size} (data.image_size)")
    number, sums, squares = train.pixel_sums()
    mean = sums[:channels] / number / 255
    if not np.isfinite(mean).all():
        raise Refused(f"data.name: {cfg.name}: some images contain NaN")
    std = np.sqrt(np.maximum(squares[:channels] / number / 255**2 - mean**2, 0))
    std = np.where(std > 0, std, 1.0)  # all pixels equal: keep them finite
    return Preprocessing(image_size, channels, mean.tolist(), std.tolist())
