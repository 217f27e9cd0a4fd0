"""The division of a dataset into training, validation and test images."""

import zlib

import numpy as np

from cnn.config import DataConfig
from cnn.datasets import grouping
from cnn.datasets.findings import Findings
from cnn.datasets.images import Images
from cnn.errors import Refused
from cnn.utils import seeding
from cnn.utils.screen import list_some

Splits = dict[str, Images]


def divide(splits: Splits, cfg: DataConfig, seed: int, findings: Findings) -> Splits:
    """Divides a dataset into the splits "train", "val" and "test".

    If the dataset has no test images, a random part of each class's training images becomes the
    test images. With folds, one fold of the training images does; test images of the dataset are
    then not used. Missing validation images are taken from the remaining training images in the
    same way. No group of images is divided. If `cfg.limit` is set, at most `cfg.limit` training
    images are kept, chosen at random.

    Args:
        splits: a dict from "train", "val" or "test" to images. The key "train" must be present. The
            dict is not changed.
        cfg: the section `data` of the settings.
        seed: determines the random choices.
        findings: gets the fact that test images are not used.

    Returns:
        A dict with the images under "train", "val" and "test".

    Raises:
        Refused: "test" or "val" is missing, but no class has two training images or groups. There
            are fewer images or groups than folds.
    """
    splits = dict(splits) if cfg.folds is None else _fold(splits, cfg, seed, findings)
    for split, fraction in (("test", cfg.test_fraction), ("val", cfg.val_fraction)):
        if split not in splits:
            train = splits["train"]
            held = _choose(train, fraction, seed, split, _numbers(train, cfg))
            splits[split] = train.subset(np.flatnonzero(held))
            splits["train"] = train.subset(np.flatnonzero(~held))
    train = splits["train"]
    if cfg.limit is not None and cfg.limit < len(train):
        chosen = _permutation(len(train), seed, "limit")[: cfg.limit]
        splits["train"] = train.subset(np.sort(chosen))
    return splits


def _fold(splits: Splits, cfg: DataConfig, seed: int, findings: Findings) -> Splits:
    """Returns the splits of a fold: the fold `cfg.fold` of the training images is the test."""
    train, shares = splits["train"], np.full(cfg.folds, 1 / cfg.folds)
    order = _permutation(len(train), seed, "folds")
    is_test = grouping.assign(_numbers(train, cfg), train.labels, shares, order) == cfg.fold
    if not is_test.any():
        number = len(np.unique(_numbers(train, cfg)))
        raise Refused(f"data.folds: too few images or groups ({number}) for {cfg.folds} folds")
    if "test" in splits:
        number = len(splits["test"])
        findings.add(f"data.folds: the {number} images of test are in no fold, and are not used")
    folded = {"train": train.subset(np.flatnonzero(~is_test))}
    return splits | folded | {"test": train.subset(np.flatnonzero(is_test))}


def _numbers(images: Images, cfg: DataConfig) -> np.ndarray:
    """Returns a number per image, equal for images that must stay together."""
    alone, names = np.arange(len(images)), images.group_names
    copies = alone if cfg.on_duplicate == "ignore" else images.identities()
    return copies if names is None else grouping.join(names, copies)


def _permutation(number: int, seed: int, use: str) -> np.ndarray:
    key = seeding.mix(seed, seeding.SPLIT, zlib.crc32(use.encode()))
    return np.random.default_rng(key).permutation(number)


def _choose(images: Images, fraction: float, seed: int, use: str, groups: np.ndarray) -> np.ndarray:
    """Chooses at random the images that are held out for another split.

    A fraction of each class is held out. A class of two or more images loses at least one image.
    Every class keeps at least one image. Copies of an image count as one image. No group is
    divided.

    Args:
        images: the N images to divide.
        fraction: the part of each class to hold out, between 0 and 1.
        seed: the seed of the run. The random choice depends on `seed` and `use`.
        use: the name of the split that gets the images, "val" or "test".
        groups: a number per image (N), equal for copies of an image and within a group.

    Returns:
        Whether each image is held out, bool (N).

    Raises:
        Refused: no class has two images or groups.
    """
    order = _permutation(len(images), seed, use)
    if images.group_names is not None:
        held = grouping.hold_out(groups, images.labels, fraction, order)
        if not held.any():
            some = list_some(list(dict.fromkeys(images.group_names.tolist())))
            raise Refused(f"data.group: too few groups to hold {use} out of them: {some}")
        return held
    order = order[np.sort(np.unique(groups[order], return_index=True)[1])]  # one of all copies
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        of_class = order[images.labels[order] == label]
        number = max(round(fraction * len(of_class)), 1) if len(of_class) > 1 else 0
        held[of_class[: min(number, len(of_class) - 1)]] = True
    if not held.any():
        raise Refused(f"data: too few images to hold {use} out of {len(images)}; no class has two")
    return np.isin(groups, groups[held])
