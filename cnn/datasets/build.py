"""The datasets by name, and the steps from a name to training, validation and test images."""

import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from cnn.config import DataConfig, is_import_path
from cnn.datasets import digits, synthetic, torchvision_datasets
from cnn.datasets.copies import check_copies
from cnn.datasets.division import Splits, divide
from cnn.datasets.findings import Findings
from cnn.datasets.folders import list_folder
from cnn.datasets.images import ArrayImages, FileImages, Images, UserImages
from cnn.datasets.listing import DEFAULT_IMAGE_SIZE, Listing, read_listing
from cnn.datasets.preprocessing import Preprocessing
from cnn.datasets.tables import list_table
from cnn.datasets.value_range import MAX_OF_16_BITS, range_of_levels
from cnn.errors import Refused
from cnn.utils.importing import import_object
from cnn.utils.screen import list_some

logger = logging.getLogger(__name__)

MAX_CUT = 0.2  # share of the pixels that may be cut away without a warning
MIN_STD = 1e-6  # of pixels in 0..1; less is only rounding


def _load_files(
    find: Callable[..., Listing], cfg: DataConfig, classes: list[str] | None, findings: Findings
) -> tuple[Splits, list[str]]:
    listing = find(cfg, findings, needs_train=classes is None)
    return read_listing(listing, cfg, findings, classes)


def _load_synthetic(cfg: DataConfig, *_) -> tuple[Splits, list[str]]:
    try:
        return synthetic.load(**cfg.args)
    except (ValueError, IndexError, MemoryError, OverflowError) as error:
        raise Refused(f"data.args: synthetic cannot be made of {cfg.args}: {error}") from None


# Each entry loads the splits that exist and the class names. The second argument is the list of
# classes of a model to evaluate, or None. Datasets with fixed classes ignore it. The third argument
# gets the facts that the user has to know.
Load = Callable[[DataConfig, list[str] | None, Findings], tuple[Splits, list[str]]]
DATASETS: dict[str, Load] = {
    "digits": lambda *_: digits.load(),
    "synthetic": _load_synthetic,
    **{
        name: lambda cfg, *_, name=name: torchvision_datasets.load(name, cfg.root, cfg.download)
        for name in torchvision_datasets.FILES
    },
    "folder": partial(_load_files, list_folder),
    "csv": partial(_load_files, list_table),
}


@dataclass(frozen=True)
class Data:
    """The training, validation and test images of a run, with class names.

    Attributes:
        train: the training images.
        val: the validation images.
        test: the test images.
        classes: the name of each class. The label of an image is an index into this list.
        preprocessing: the image size, the number of channels and the normalization for the model.
        findings: the facts about the data that the user has to know.
    """

    train: Images
    val: Images
    test: Images
    classes: list[str]
    preprocessing: Preprocessing
    findings: Findings = field(default_factory=Findings)

    @property
    def splits(self) -> Splits:
        """The images of all splits, as a dict from "train", "val" and "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def head(self, number: int) -> "Data":
        """Returns the same data with only a few images of each split, of all classes in turn.

        Args:
            number: how many images of each split to keep. A smaller split is kept whole.
        """
        splits = self.splits.values()
        cut = [images.subset(_some_of_each(images.labels, number)) for images in splits]
        return Data(*cut, self.classes, self.preprocessing, self.findings)

    def fingerprint(self) -> dict[str, int]:
        """Returns the image counts and a checksum of the data.

        A later run can compare the values to notice changed data. A checkpoint of an earlier
        version lacks "content". So data are unchanged if they have all values of the checkpoint.

        Returns:
            The numbers of images under "train", "val" and "test", and a CRC-32 under "checksum".
            The CRC-32 covers the labels and names of all images. Of a path, only the file name
            counts. Except for a user's own dataset class, the CRC-32 depends on the pixels, too.
            Another CRC-32, under "content", depends on every single pixel, and one under "groups"
            on the names of the groups.
        """
        splits, checksum = self.splits, self.train.checksum()
        for images in splits.values():
            names = "\0".join(
                images.name(i).replace("\\", "/").rsplit("/", 1)[-1] for i in range(len(images))
            )
            checksum = zlib.crc32(os.fsencode(names), zlib.crc32(images.labels.tobytes(), checksum))
        identities = np.concatenate([images.identities() for images in splits.values()])
        numbers = {split: len(images) for split, images in splits.items()}
        names = [n for i in splits.values() if i.group_names is not None for n in i.group_names]
        numbers |= {"checksum": checksum, "content": zlib.crc32(identities)}
        return numbers | {"groups": zlib.crc32("\0".join(names).encode())}


def _some_of_each(labels: np.ndarray, number: int) -> np.ndarray:
    """Returns the indices of a few images: the first of each class, the second, and so on.

    Args:
        labels: the label of each image (N).
        number: the number of indices to return. If there are more classes than that, the images
            are of some of the classes, at equal distances.

    Returns:
        The indices in ascending order.
    """
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    some = by_class[:: -(-len(by_class) // number)]
    in_turn = [index for turn in zip_longest(*some) for index in turn if index is not None]
    return np.sort(in_turn[:number])


def as_trained(
    cfg: DataConfig, fingerprint: dict[str, int], preprocessing: Preprocessing
) -> DataConfig:
    """Returns the settings with which the data of a checkpoint are read again.

    Earlier versions did not look for copies, decoded all pixels of JPEG files, and had no groups.

    Args:
        cfg: the section `data` of the settings.
        fingerprint: the fingerprint of the data in the checkpoint.
        preprocessing: the preprocessing in the checkpoint.
    """
    return replace(
        cfg,
        image_size=preprocessing.image_size,
        channels=preprocessing.channels,
        fit=preprocessing.fit,
        decode="scaled" if preprocessing.scaled else "full",
        on_duplicate=cfg.on_duplicate if "content" in fingerprint else "ignore",
        group=cfg.group if cfg.group or "groups" in fingerprint else "",
    )


def build_data(cfg: DataConfig, seed: int, preprocessing: Preprocessing | None = None) -> Data:
    """Reads training, validation and test images.

    If the dataset has no test images, a fraction of each class's training images becomes the test
    images. Missing validation images are replaced in the same way. A warning is logged for each
    split without images of some class.

    Args:
        cfg: the section `data` of the settings.
        seed: determines which training images become test or validation images. If `cfg.limit` is
            set, the seed also determines which of the remaining training images are used.
        preprocessing: the preprocessing of a run that resumes. If None, the preprocessing has the
            mean and std of the training images.

    Returns:
        The images, the class names and the preprocessing.

    Raises:
        Refused: the data cannot be read or cannot be divided.
    """
    findings = Findings()
    splits, classes = read_splits(cfg, findings)
    if cfg.positive is not None and (len(classes) != 2 or cfg.positive not in classes):
        of = list_some(classes) if len(classes) == 2 else f"two classes; there are {len(classes)}"
        raise Refused(f"data.positive: expected one of {of}, got {cfg.positive!r}")
    _tell_copies(cfg, splits, classes, findings)
    splits = divide(splits, cfg, seed, findings)
    _tell_cut(cfg, splits, findings)
    for split, images in splits.items():
        present = set(images.labels.tolist())
        absent = [name for number, name in enumerate(classes) if number not in present]
        if absent:
            logger.warning("%s has no image of: %s", split, ", ".join(absent[:20]))
    if preprocessing is None:
        preprocessing = _choose_preprocessing(cfg, splits["train"], findings)
    elif isinstance(splits["train"], FileImages):
        splits["train"].decode_as(preprocessing.channels, preprocessing.value_range)
    return Data(splits["train"], splits["val"], splits["test"], classes, preprocessing, findings)


def _tell_copies(cfg: DataConfig, splits: Splits, classes: list[str], findings: Findings) -> None:
    """Tells the user about copies among images in memory, which all stay.

    These are known datasets, and their figures are comparable only if nothing is left out.
    """
    arrays = {split: part for split, part in splits.items() if isinstance(part, ArrayImages)}
    if arrays and cfg.on_duplicate != "ignore":
        items = [
            (images.name(index), classes[label], split)
            for split, images in arrays.items()
            for index, label in enumerate(images.labels)
        ]
        numbers = np.concatenate([images.identities() for images in arrays.values()])
        check_copies(numbers, items, "keep", findings)


def _tell_cut(cfg: DataConfig, splits: Splits, findings: Findings) -> None:
    """Warns the user if more than a fifth of the pixels of image files are cut away for squares.

    Only training and validation images count. The images of known datasets are squares.
    """
    parts = [splits[name] for name in ("train", "val")]
    if cfg.fit != "crop" or not isinstance(parts[0], FileImages):
        return
    scans = np.concatenate([part.files.scans[part.rows] for part in parts])
    shorter, longer = np.sort([scans["height"], scans["width"]], axis=0)
    cut = 1 - (shorter**2).sum() / (shorter * longer).sum()
    if cut > MAX_CUT:
        line = f"data.fit=crop cuts away {cut:.0%} of the pixels; data.fit=pad or stretch keeps all"
        findings.add(line, level=logging.WARNING)


def read_splits(
    cfg: DataConfig, findings: Findings, model_classes: list[str] | None = None
) -> tuple[Splits, list[str]]:
    """Reads a dataset with the splits that the dataset comes with.

    Args:
        cfg: the section `data` of the settings.
        findings: gets the facts about the data that the user has to know.
        model_classes: the class names of a model to evaluate, in the order of the model's outputs.
            The labels of image folders and CSV files are then indices into this list. Other
            datasets ignore this argument. If None, the dataset determines the classes.

    Returns:
        Two values. The first value is a dict from "train", "val" or "test" to the images. The
        second value is a list of the class names in the order of the labels. Of two classes, the
        second one is positive.

    Raises:
        Refused: the data cannot be read, or the dataset does not accept a keyword in `cfg.args`.
    """
    if cfg.name in ("digits", "synthetic") and cfg.root != DataConfig.root:
        line = f"data.root: {cfg.root} is not used by data.name={cfg.name}"
        findings.add(f"{line}; data.name=folder reads a folder, csv a table", level=logging.WARNING)
    if cfg.group and cfg.name not in ("folder", "csv"):
        expected = "data.name=folder or csv, whose images are files"
        raise Refused(f"data.group: expected {expected}, got data.name={cfg.name}")
    try:
        if is_import_path(cfg.name):
            found = import_object(cfg.name, "data.name")(root=cfg.root, **cfg.args)
            splits, classes = _check_user_dataset(cfg, found)
        else:
            splits, classes = DATASETS[cfg.name](cfg, model_classes, findings)
    except TypeError as error:  # a keyword that the function does not take
        raise Refused(f"data.args: {cfg.name}: {error}") from error
    if len(classes) == 2 and classes[0] == cfg.positive:
        for images in splits.values():
            images.labels = 1 - images.labels
        classes = classes[::-1]
    return splits, classes


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


def _choose_preprocessing(cfg: DataConfig, train: Images, findings: Findings) -> Preprocessing:
    """Chooses the image size, the channels and the normalization for a dataset.

    The image size and the number of channels come from the settings. If the setting of the number
    of channels is None, the images' own number is used. If the setting of the image size is None,
    the images' own size is used. Without a setting, images that are not squares of one size get 224
    pixels.

    Image files of all splits are set to be decoded to this number of channels, if the settings
    have 1 or 3 channels, and with the range of values of the training images.

    Args:
        cfg: the section `data` of the settings.
        train: the training images, which determine the mean and std.
        findings: gets the range of values of images with more than 8 bits.

    Raises:
        Refused: the images have another number of channels than the settings and cannot be
            converted, or some images contain NaN, or all images are alike.
    """
    channels, smallest, largest = train.sizes()
    value_range = None
    if isinstance(train, FileImages):
        value_range = _choose_value_range(cfg, train, findings)
        train.decode_as(cfg.channels, value_range)
        channels = train.files.form.channels
    if cfg.channels not in (None, channels):
        raise Refused(f"data.channels: {cfg.name} has {channels}, got {cfg.channels}")
    if cfg.value_range and value_range is None:
        findings.add("data.value_range is not used; no image file has more than 8 bits")
    image_size = cfg.image_size or (largest if smallest == largest else DEFAULT_IMAGE_SIZE)
    number, sums, squares = train.pixel_sums()
    mean = sums[:channels] / number / 255
    if not np.isfinite(mean).all():
        raise Refused(f"data.name: {cfg.name}: some images contain NaN")
    std = np.sqrt(np.maximum(squares[:channels] / number / 255**2 - mean**2, 0))
    if std.max() < MIN_STD:
        raise Refused("data: all training images are alike: one value, or outside data.value_range")
    std = np.where(std < MIN_STD, 1.0, std)  # dividing by 1 keeps a constant channel finite
    of_files = (value_range, cfg.fit, cfg.decode == "scaled")
    return Preprocessing(image_size, channels, mean.tolist(), std.tolist(), *of_files)


def _choose_value_range(
    cfg: DataConfig, train: FileImages, findings: Findings
) -> list[float] | None:
    """Chooses the values of images with more than 8 bits that become black and white.

    Args:
        cfg: the section `data` of the settings.
        train: the training images.
        findings: gets the range.

    Returns:
        The range. None if all images have 8 bits, or if the settings have no range and all training
        images have 8 bits.

    Raises:
        Refused: some images have integers and some have floats, and the settings have no range.
    """
    kinds = sorted(set(train.files.scans["kind"].tolist()) - {b""})
    levels = train.files.scans[train.rows]
    levels = levels["levels"][levels["kind"] != b""]  # N, 5
    if not kinds:
        return None
    found = b", ".join(kinds).decode()
    if not cfg.value_range and len({kind.startswith(b"float") for kind in kinds}) == 2:
        advice = "store all images alike, or say what is black and white in data.value_range"
        raise Refused(f"data.root: integers and floats have no common range ({found}); {advice}")
    chosen = cfg.value_range or (range_of_levels(levels) if len(levels) else None)
    values = "values {:g} to {:g} become black to white (data.value_range=[low, high])"
    values = values.format(*(chosen or (0, MAX_OF_16_BITS)))
    number = len(train) - len(levels)
    others = f"; {number} of {len(train)} training images have 8 bits, and are taken as they are"
    level = logging.WARNING if number else logging.INFO
    findings.add(f"images of {found}: {values}{others * bool(number)}", level=level)
    return chosen
