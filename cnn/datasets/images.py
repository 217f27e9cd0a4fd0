"""Labelled images, wherever they lie: in an array, in files, in a dataset of the user's.

Each kind has `labels` (int64, N), gives image i as a tensor C, H, W (uint8, or float in 0..1),
names it, selects a part of itself, and knows the sums that mean and std are made of.
"""

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn.datasets.cache import decode_all
from cnn.datasets.decode import decode
from cnn.errors import BadImage, Refused, describe
from cnn.utils import seeding

MAX_IMAGES_FOR_STATISTICS = 2_000  # of a dataset that has to be read one by one


class Images:
    """Labelled images; each kind says where they come from.

    Attributes:
        labels: int64 (N).
        skip: whether an image that cannot be read during the run is left out of its batch.
        may_draw: whether what gives an image may draw from the global generators.
    """

    labels: np.ndarray
    skip = may_draw = False

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Of the pixels; 0 where reading them all may take long."""
        return 0

    def num_decoded(self) -> int:
        """How many images `decoded` gives: this part's and the others' of the same store."""
        return len(self)

    def decoded(self, size: int, channels: int) -> torch.Tensor | None:
        """All of them, uint8 (M, size, size, C); None where they cannot be had so."""
        return None


class ArrayImages(Images):
    """Images of one size in memory, or a part of them: pixels uint8 (N, C, H, W), labels (N)."""

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: Sequence[int], name: str):
        pixels = torch.as_tensor(pixels)
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.store = pixels.permute(0, 2, 3, 1).contiguous()  # M, H, W, C; shared by all parts
        self.rows = np.arange(len(pixels))  # of this part, in the store
        self.labels = np.asarray(labels, dtype=np.int64)
        self._name = name

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store[self.rows[index]].permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"{self._name}[{self.rows[index]}]"

    def subset(self, indices: np.ndarray) -> "ArrayImages":
        part = copy.copy(self)
        part.rows, part.labels = self.rows[indices], self.labels[indices]
        return part

    def sizes(self) -> tuple[int, int, int]:
        """Channels, and the least and the largest side in pixels."""
        _, height, width, channels = self.store.shape
        return channels, min(height, width), max(height, width)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Number of pixels, sum and sum of squares a channel, of values in 0..255."""
        height, width, channels = self.store.shape[1:]
        counts = np.zeros((channels, 256))
        for start in range(0, len(self), 4_096):
            part = self.store[self.rows[start : start + 4_096]].numpy()
            for channel in range(channels):
                counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
        values = np.arange(256.0)
        return float(len(self) * height * width), counts @ values, counts @ values**2

    def checksum(self) -> int:
        """Of the pixels of the whole store."""
        return zlib.crc32(self.store.numpy())

    def num_decoded(self) -> int:
        return len(self.store)

    def decoded(self, size: int, channels: int) -> torch.Tensor | None:
        """The store, uint8 (M, size, size, C), where the images have that size."""
        return self.store if self.store.shape[1:] == (size, size, channels) else None


@dataclass
class Files:
    """Image files that were scanned together, and what is known of them."""

    root: Path
    paths: list[Path]
    scans: np.ndarray  # a row a file, as `scan.scan` gives
    channels: int  # to decode to
    skip: bool = False  # whether a file that goes bad during the run is left out of its batch


class FileImages(Images):
    """Images in files, or a part of them, decoded when asked for."""

    def __init__(self, files: Files, labels: Sequence[int], rows: np.ndarray | None = None):
        self.files = files
        self.rows = np.arange(len(files.paths)) if rows is None else rows
        self.labels = np.asarray(labels, dtype=np.int64)

    @property
    def skip(self) -> bool:
        return self.files.skip

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.files.paths[self.rows[index]]
        try:
            return torch.from_numpy(decode(path, self.files.channels))
        except BadImage as bad:
            raise BadImage(f"{path}: {bad}") from None

    def name(self, index: int) -> str:
        return str(self.files.paths[self.rows[index]])

    def subset(self, indices: np.ndarray) -> "FileImages":
        return FileImages(self.files, self.labels[indices], self.rows[indices])

    def detached(self) -> "FileImages":
        """The same part, of files of its own: what is decoded once is then no more than it."""
        files = replace(
            self.files,
            paths=[self.files.paths[row] for row in self.rows],
            scans=self.files.scans[self.rows],
        )
        return FileImages(files, self.labels)

    def sizes(self) -> tuple[int, int, int]:
        scans = self.files.scans[self.rows]
        sides = np.stack([scans["height"], scans["width"]])
        return self.files.channels, int(sides.min()), int(sides.max())

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        scans = self.files.scans[self.rows]
        number = float((scans["height"] * scans["width"]).sum())
        channels = [3] if self.files.channels == 1 else [0, 1, 2]
        return number, scans["sums"].sum(axis=0)[channels], scans["squares"].sum(axis=0)[channels]

    def checksum(self) -> int:
        """Of every file's sums of pixels, which the scan has taken."""
        return zlib.crc32(np.ascontiguousarray(self.files.scans["sums"]))

    def num_decoded(self) -> int:
        return len(self.files.paths)

    def decoded(self, size: int, channels: int) -> torch.Tensor | None:
        """All the files' pixels, uint8 (M, size, size, C), decoded once and kept in the cache."""
        self.files.channels = channels
        return decode_all(self.files.root, self.files.paths, self.files.scans, size, channels)


class UserImages(Images):
    """A map-style dataset of (image, label): PIL, uint8 array (H, W[, C]) or tensor (C, H, W).

    Nothing is decoded once and kept: what it gives is not known to stay the same.
    """

    may_draw = True

    def __init__(self, dataset: Any, name: str):
        self.dataset = dataset
        self._name = name
        self.indices = np.arange(len(dataset))
        given = (getattr(dataset, attribute, None) for attribute in ("targets", "labels"))
        known = next((labels for labels in given if labels is not None), None)
        if known is None:
            known = [self._item(index)[1] for index in range(len(dataset))]
        self.labels = _whole_numbers(known, name)

    def __getitem__(self, index: int) -> torch.Tensor:
        return _as_tensor(self._item(index)[0], self.name(index))

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[int(self.indices[index])]
        except Exception as error:
            raise Refused(f"{self.name(index)}: {describe(error)}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise Refused(f"{self.name(index)}: expected (image, label), got {type(item).__name__}")
        return item

    def name(self, index: int) -> str:
        return f"{self._name}[{self.indices[index]}]"

    def subset(self, indices: np.ndarray) -> "UserImages":
        part = copy.copy(self)
        part.indices, part.labels = self.indices[indices], self.labels[indices]
        return part

    def _some(self) -> list[torch.Tensor]:
        """Images for the statistics, the same every time, whatever the dataset draws."""
        some = []
        for index in range(0, len(self), max(1, len(self) // MAX_IMAGES_FOR_STATISTICS)):
            seeding.seed_sample(seeding.SAMPLE, index)
            some.append(self[index])
        return some

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


def _whole_numbers(labels: Any, name: str) -> np.ndarray:
    """The labels as int64 (N). Refuses others than whole numbers: cut off, 1.7 would be class 1."""
    plain = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
    for number, label in enumerate(plain):
        if not isinstance(label, int):
            raise Refused(
                f"{name}[{number}]: expected a label that is a whole number, the number of a class;"
                f" got {label!r} ({type(label).__name__}): give int(label) if it stands for one"
            )
    return np.asarray(plain, dtype=np.int64)


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
