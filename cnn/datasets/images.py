"""Labelled images, wherever they lie: in an array, in files, in a dataset of the user's.

Each kind has `labels` (int64, N), gives image i as a tensor C, H, W (uint8, or float in 0..1),
names it, selects a part of itself, and knows the sums that mean and std are made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn.config import Refused
from cnn.datasets.decode import BadImage, decode

MAX_IMAGES_FOR_STATISTICS = 2_000  # of a dataset that has to be read one by one


class ArrayImages:
    """Images of one size that fit in memory: pixels uint8 (N, C, H, W), labels (N)."""

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: Sequence[int], name: str):
        self.pixels = torch.as_tensor(pixels)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.numbers = np.arange(len(self.labels))  # in the whole set, whatever part this is
        self._name = name
        assert self.pixels.dtype == torch.uint8 and self.pixels.ndim == 4
        assert len(self.pixels) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]

    def name(self, index: int) -> str:
        return f"{self._name}[{self.numbers[index]}]"

    def subset(self, indices: np.ndarray) -> "ArrayImages":
        part = ArrayImages(self.pixels[torch.as_tensor(indices)], self.labels[indices], self._name)
        part.numbers = self.numbers[indices]
        return part

    def sizes(self) -> tuple[int, int, int]:
        """Channels, and the least and the largest side in pixels."""
        _, channels, height, width = self.pixels.shape
        return channels, min(height, width), max(height, width)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Number of pixels, sum and sum of squares a channel, of values in 0..255."""
        values = np.arange(256.0)
        sums, squares = [], []
        for channel in range(self.pixels.shape[1]):
            counts = np.zeros(256)
            for part in self.pixels[:, channel].split(4_096):
                counts += np.bincount(part.numpy().ravel(), minlength=256)
            sums.append(counts @ values)
            squares.append(counts @ values**2)
        return self.pixels[:, 0].numel(), np.array(sums), np.array(squares)


class FileImages:
    """Images in files, decoded when asked for.

    Args:
        scans: a row a file, as `scan.scan` gives.
        skip: whether a file that goes bad during the run is left out; else it stops the run.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], scans: np.ndarray, skip: bool = False
    ):
        self.skip = skip
        self.paths = list(paths)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.scans = scans
        self.channels = 1 if len(scans) and scans["gray"].all() else 3

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            return torch.from_numpy(decode(self.paths[index], self.channels))
        except BadImage as bad:
            raise BadImage(f"{self.name(index)}: {bad}") from None

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def subset(self, indices: np.ndarray) -> "FileImages":
        paths = [self.paths[i] for i in indices]
        part = FileImages(paths, self.labels[indices], self.scans[indices], self.skip)
        part.channels = self.channels
        return part

    def sizes(self) -> tuple[int, int, int]:
        sides = np.stack([self.scans["height"], self.scans["width"]])
        return self.channels, int(sides.min()), int(sides.max())

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        number = float((self.scans["height"] * self.scans["width"]).sum())
        return number, self.scans["sums"].sum(axis=0), self.scans["squares"].sum(axis=0)


class UserImages:
    """A map-style dataset of (image, label): PIL, uint8 array (H, W[, C]) or tensor (C, H, W)."""

    def __init__(self, dataset: Any, name: str, indices: np.ndarray | None = None):
        self.dataset = dataset
        self._name = name
        self.indices = np.arange(len(dataset)) if indices is None else indices
        known = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if known is None:
            known = [int(dataset[i][1]) for i in range(len(dataset))]
        self.labels = np.asarray(known, dtype=np.int64)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            item = self.dataset[int(self.indices[index])]
        except OSError as error:  # a file of the user's is gone; Pillow's errors are of this kind
            raise BadImage(f"{self.name(index)}: {error}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise Refused(f"{self.name(index)}: expected (image, label), got {type(item).__name__}")
        return _as_tensor(item[0], self.name(index))

    def name(self, index: int) -> str:
        return f"{self._name}[{self.indices[index]}]"

    def subset(self, indices: np.ndarray) -> "UserImages":
        return UserImages(self.dataset, self._name, self.indices[indices])

    def _some(self) -> list[torch.Tensor]:
        step = max(1, len(self) // MAX_IMAGES_FOR_STATISTICS)
        return [self[i] for i in range(0, len(self), step)]

    def sizes(self) -> tuple[int, int, int]:
        shapes = {tuple(image.shape) for image in self._some()}
        sides = [side for shape in shapes for side in shape[1:]]
        channels = {shape[0] for shape in shapes}
        if len(channels) > 1:
            raise Refused(f"{self._name}: expected one number of channels, got {sorted(channels)}")
        return channels.pop(), min(sides), max(sides)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        number, sums, squares = 0.0, 0.0, 0.0
        for image in self._some():
            values = image.double().flatten(1) * (1 if image.dtype == torch.uint8 else 255)
            number += values.shape[1]
            sums = sums + values.sum(1).numpy()
            squares = squares + values.square().sum(1).numpy()
        return number, sums, squares


Images = ArrayImages | FileImages | UserImages


def _as_tensor(image: Any, name: str) -> torch.Tensor:
    """The user's image as uint8 or float 0..1, (C, H, W)."""
    if not isinstance(image, torch.Tensor):
        array = np.asarray(image)
        if array.ndim == 2:
            array = array[:, :, None]
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise Refused(
            f"{name}: expected an image as PIL, a uint8 array (H, W, C), or a tensor (C, H, W) of"
            f" uint8 or of float in 0..1; got {image.dtype} of shape {tuple(image.shape)}"
        )
    return image
