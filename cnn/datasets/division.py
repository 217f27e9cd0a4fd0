"""The division of a dataset into training, validation and test images."""

import zlib

import numpy as np

from cnn.config import DataConfig
from cnn.datasets.images import Images
from cnn.errors import Refused
from cnn.utils import seeding

Splits = dict[str, Images]


def divide(splits: Splits, cfg: DataConfig, seed: int) -> Splits:
    """Returns train, val and test; holds a missing one out of the training images.

    Args:
        seed: on which the choice of the images depends, and that of `data.limit`.

    Raises:
        Refused: there are too few training images.
    """
    splits = dict(splits)
    for split, fraction in (("test", cfg.test_fraction), ("val", cfg.val_fraction)):
        if split not in splits:
            splits["train"], splits[split] = _hold_out(splits["train"], fraction, seed, split)
    train = splits["train"]
    if cfg.limit is not None and cfg.limit < len(train):
        chosen = _permutation(len(train), seed, "limit")[: cfg.limit]
        splits["train"] = train.subset(np.sort(chosen))
    return splits


def _permutation(number: int, seed: int, use: str) -> np.ndarray:
    key = seeding.mix(seed, seeding.SPLIT, zlib.crc32(use.encode()))
    return np.random.default_rng(key).permutation(number)


def _hold_out(images: Images, fraction: float, seed: int, use: str) -> tuple[Images, Images]:
    """Divides images into those to keep and those held out: a fraction of every class.

    Holds out at least one image of each class that has two, and never all of them.
    """
    order = _permutation(len(images), seed, use)
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        of_class = order[images.labels[order] == label]
        number = max(round(fraction * len(of_class)), 1) if len(of_class) > 1 else 0
        held[of_class[: min(number, len(of_class) - 1)]] = True
    if not held.any():
        raise Refused(f"data: too few images to hold {use} out of {len(images)}; no class has two")
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))
