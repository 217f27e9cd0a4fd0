"""Train, val and test: what is missing is held out of the training images."""

import zlib

import numpy as np

from cnn.config import DataConfig
from cnn.datasets.images import Images
from cnn.errors import Refused
from cnn.utils import seeding

Splits = dict[str, Images]


def divide(splits: Splits, cfg: DataConfig, seed: int) -> Splits:
    """Train, val and test, what is missing held out of the training images.

    Raises:
        Refused: there are too few of them.
    """
    splits = dict(splits)
    if "test" not in splits:
        splits["train"], splits["test"] = _hold_out(
            splits["train"], cfg.test_fraction, seed, "test"
        )
    if "val" not in splits:
        splits["train"], splits["val"] = _hold_out(splits["train"], cfg.val_fraction, seed, "val")
    train = splits["train"]
    if cfg.limit is not None and cfg.limit < len(train):
        chosen = _permutation(len(train), seed, "limit")[: cfg.limit]
        splits["train"] = train.subset(np.sort(chosen))
    return splits


def _permutation(number: int, seed: int, use: str) -> np.ndarray:
    key = seeding.mix(seed, seeding.SPLIT, zlib.crc32(use.encode()))
    return np.random.default_rng(key).permutation(number)


def _hold_out(images: Images, fraction: float, seed: int, use: str) -> tuple[Images, Images]:
    """Takes a share of every class out, at least one image of each that has two."""
    order = _permutation(len(images), seed, use)
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        of_class = order[images.labels[order] == label]
        number = max(round(fraction * len(of_class)), 1) if len(of_class) > 1 else 0
        held[of_class[: min(number, len(of_class) - 1)]] = True
    if not held.any():
        raise Refused(f"data: too few images to hold {use} out of {len(images)}; no class has two")
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))
