"""What data there is: a table of names, and the way from a name to train, val and test."""

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

DEFAULT_IMAGE_SIZE = 224  # for images of several sizes, where the user names none

# Each is given the classes of a model too, or None; those whose classes are their own pass it by.
DATASETS: dict[str, Callable[[DataConfig, list[str] | None], tuple[Splits, list[str]]]] = {
    "digits": lambda cfg, _: digits.load(),
    "synthetic": lambda cfg, _: synthetic.load(**cfg.args),
    **{
        name: lambda cfg, _, name=name: torchvision_datasets.load(name, cfg.root, cfg.download)
        for name in torchvision_datasets.FILES
    },
    "folder": lambda cfg, classes: folder_and_csv.load_folder(cfg.root, cfg.on_bad_image, classes),
    "csv": lambda cfg, classes: folder_and_csv.load_csv(cfg.root, cfg.on_bad_image, classes),
}


@dataclass(frozen=True)
class Data:
    train: Images
    val: Images
    test: Images
    classes: list[str]
    preprocessing: Preprocessing

    def with_preprocessing(self, preprocessing: Preprocessing) -> "Data":
        """The same data, for a model that was trained on images prepared in that way."""
        return replace(self, preprocessing=preprocessing)

    def head(self, number: int) -> "Data":
        """The first so many images of each split."""
        parts = (self.train, self.val, self.test)
        cut = [images.subset(np.arange(min(number, len(images)))) for images in parts]
        cut = [part.detached() if isinstance(part, FileImages) else part for part in cut]
        return Data(*cut, self.classes, self.preprocessing)

    def fingerprint(self) -> dict[str, int]:
        """Number of images a split, and a checksum over which they are and what they show."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        checksum = self.train.checksum()
        for images in parts.values():
            names = "\0".join(
                images.name(i).replace("\\", "/").rsplit("/", 1)[-1] for i in range(len(images))
            )
            checksum = zlib.crc32(os.fsencode(names), zlib.crc32(images.labels.tobytes(), checksum))
        return {name: len(images) for name, images in parts.items()} | {"checksum": checksum}


def build_data(cfg: DataConfig, seed: int) -> Data:
    """Reads the data and divides it.

    Where there is no test set or no validation set, it is held out of the training images,
    stratified, as a function of the seed. Mean and std are those of the training images.

    Raises:
        Refused: the data cannot be had or cannot be divided.
    """
    splits, classes = read_splits(cfg)
    splits = divide(splits, cfg, seed)
    for split, images in splits.items():
        absent = [
            classes[i] for i in sorted(set(range(len(classes))) - set(images.labels.tolist()))
        ]
        if absent:
            logger.warning("%s has no image of: %s", split, ", ".join(absent[:20]))
    preprocessing = _choose_preprocessing(cfg, splits["train"])
    return Data(splits["train"], splits["val"], splits["test"], classes, preprocessing)


def read_splits(cfg: DataConfig, known: list[str] | None = None) -> tuple[Splits, list[str]]:
    """The data as they come, with the names of their classes.

    Args:
        known: the classes of a model that is to be evaluated; folders and tables then go by them.

    Raises:
        Refused: the data cannot be had.
    """
    try:
        if not is_import_path(cfg.name):
            return DATASETS[cfg.name](cfg, known)
        made = import_object(cfg.name, "data.name")(root=cfg.root, **cfg.args)
    except TypeError as error:  # a keyword that the function does not take
        raise Refused(f"data.args: {cfg.name}: {error}") from error
    except (ValueError, IndexError, MemoryError, OverflowError) as error:
        if cfg.name != "synthetic" or isinstance(error, Refused):
            raise
        raise Refused(f"data.args: synthetic cannot be made of {cfg.args}: {error}") from None
    if not isinstance(made, dict) or "train" not in made or "classes" not in made:
        raise Refused(
            f"data.name: expected {cfg.name} to return a dict with train, classes and, if there"
            f" are, val and test; got {type(made).__name__}"
        )
    classes = [str(name) for name in made["classes"]]
    if len(set(classes)) < len(classes):
        raise Refused(f"data.name: {cfg.name}: expected classes that differ, got {classes[:9]}")
    splits: dict[str, Any] = {
        part: UserImages(made[part], f"{cfg.name} {part}")
        for part in ("train", "val", "test")
        if made.get(part) is not None
    }
    for part, images in splits.items():
        if len(images) and not (0 <= images.labels.min() and images.labels.max() < len(classes)):
            raise Refused(f"data.name: {part}: expected labels 0 to {len(classes) - 1}")
    return splits, classes


def _choose_preprocessing(cfg: DataConfig, train: Images) -> Preprocessing:
    channels, smallest, largest = train.sizes()
    if cfg.channels in (1, 3) and isinstance(train, FileImages):
        channels = train.files.channels = cfg.channels
    elif cfg.channels not in (None, channels):
        raise Refused(f"data.channels: {cfg.name} has {channels}, got {cfg.channels}")
    image_size = cfg.image_size or (largest if smallest == largest else DEFAULT_IMAGE_SIZE)
    if cfg.image_size is None and smallest != largest:
        logger.info(
            f"images have sides of {smallest} to {largest} pixels; resized and cropped to"
            f" {image_size} (data.image_size)"
        )
    number, sums, squares = train.pixel_sums()
    mean = sums[:channels] / number / 255
    if not np.isfinite(mean).all():
        raise Refused(f"data.name: {cfg.name}: some images hold values that are no numbers (NaN)")
    std = np.sqrt(np.maximum(squares[:channels] / number / 255**2 - mean**2, 0))
    std = np.where(std > 0, std, 1.0)  # images of one value: nothing to divide by
    return Preprocessing(image_size, channels, mean.tolist(), std.tolist())
