"""Labelled images from three sources: an array in memory, files, or a user's own dataset.

Every class has `labels` (int64, N), returns image i as a tensor (C, H, W), uint8 or float in 0..1,
and its name, selects a subset, and computes the sums from which mean and std follow.
"""

import copy
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from cnn.datasets.cache import decode_all
from cnn.datasets.decode import decode
from cnn.errors import BadImage, Refused, describe
from cnn.utils import seeding

MAX_IMAGES_FOR_STATISTICS = 2_000  # of a user's dataset, which has to be read image by image


class Images:
    """Labelled images; the subclasses know where the pixels come from.

    Attributes:
        labels: int64 (N).
        rows: int64 (N), the place of each image in what all subsets share.
        skip: whether an image that cannot be read during the run is left out of its batch.
        may_draw: whether reading an image may draw from the global random generators.
    """

    labels: np.ndarray
    rows: np.ndarray
    skip = may_draw = False
    _name: str

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the name of an image: its path, or the dataset's name and the image's place."""
        return f"{self._name}[{self.rows[index]}]"

    def subset(self, indices: np.ndarray) -> Self:
        """Returns the images at these indices; their pixels are not copied."""
        part = copy.copy(self)
        part.rows, part.labels = self.rows[indices], self.labels[indices]
        return part

    def checksum(self) -> int:
        """Returns a checksum of the pixels, or 0 where reading them all may take long."""
        return 0

    def num_decoded(self) -> int:
        """Returns the number of images in `decoded`: those of all subsets."""
        return len(self)

    def decoded(self, _size: int, _channels: int) -> torch.Tensor | None:
        """Returns all images, uint8 (M, size, size, C), or None where they cannot be in memory."""
        return None


class ArrayImages(Images):
    """Images of one size in memory.

    Args:
        pixels: uint8 (N, C, H, W).
        labels: (N).
        name: of the dataset, for messages.
    """

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: Sequence[int], name: str):
        pixels = torch.as_tensor(pixels)
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.store = pixels.permute(0, 2, 3, 1).contiguous()  # M, H, W, C; shared by all subsets
        self.rows = np.arange(len(pixels))
        self.labels = np.asarray(labels, dtype=np.int64)
        self._name = name

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.store[self.rows[index]].permute(2, 0, 1)

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels, and the shortest and the longest side in pixels."""
        _, height, width, channels = self.store.shape
        return channels, min(height, width), max(height, width)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the number of pixels, and per channel sum and sum of squares of 0..255 values."""
        height, width, channels = self.store.shape[1:]
        counts = np.zeros((channels, 256))
        for start in range(0, len(self), 4_096):
            part = self.store[self.rows[start : start + 4_096]].numpy()
            for channel in range(channels):
                counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
        values = np.arange(256.0)
        return float(len(self) * height * width), counts @ values, counts @ values**2

    def checksum(self) -> int:
        """Returns a checksum of the whole store's pixels."""
        return zlib.crc32(self.store.numpy())

    def num_decoded(self) -> int:
        """Returns the number of images in the store."""
        return len(self.store)

    def decoded(self, size: int, channels: int) -> torch.Tensor | None:
        """Returns the store, uint8 (M, size, size, C), where the images have that size."""
        return self.store if self.store.shape[1:] == (size, size, channels) else None


@dataclass
class Files:
    """The image files of a dataset, shared by its splits.

    Attributes:
        scans: a row per file, of the dtype `scan.SCAN`.
        channels: to which they are decoded.
        skip: whether a file that cannot be read during the run is left out of its batch.
    """

    root: Path
    paths: list[Path]
    scans: np.ndarray
    channels: int
    skip: bool = False


class FileImages(Images):
    """Images in files, decoded when they are read.

    Args:
        labels: (N).
        rows: the place of each image in `files`; by default all files in their order.
    """

    def __init__(self, files: Files, labels: Sequence[int], rows: np.ndarray | None = None):
        self.files, self.skip = files, files.skip
        self.rows = np.arange(len(files.paths)) if rows is None else rows
        self.labels = np.asarray(labels, dtype=np.int64)

    def __getitem__(self, index: int) -> torch.Tensor:
        path = self.files.paths[self.rows[index]]
        try:
            return torch.from_numpy(decode(path, self.files.channels))
        except BadImage as bad:
            raise BadImage(f"{path}: {bad}") from None

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return str(self.files.paths[self.rows[index]])

    def detached(self) -> "FileImages":
        """Returns the same images with no other files, so that `decoded` decodes only these."""
        paths = [self.files.paths[row] for row in self.rows]
        files = replace(self.files, paths=paths, scans=self.files.scans[self.rows])
        return FileImages(files, self.labels)

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels, and the shortest and the longest side in pixels."""
        scans = self.files.scans[self.rows]
        sides = np.stack([scans["height"], scans["width"]])
        return self.files.channels, int(sides.min()), int(sides.max())

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the number of pixels, and per channel sum and sum of squares of 0..255 values."""
        scans = self.files.scans[self.rows]
        number = float((scans["height"] * scans["width"]).sum())
        channels = [3] if self.files.channels == 1 else [0, 1, 2]
        return number, scans["sums"].sum(axis=0)[channels], scans["squares"].sum(axis=0)[channels]

    def checksum(self) -> int:
        """Returns a checksum of every file's sums of pixels, as the scan found them."""
        return zlib.crc32(np.ascontiguousarray(self.files.scans["sums"]))

    def num_decoded(self) -> int:
        """Returns the number of files."""
        return len(self.files.paths)

    def decoded(self, size: int, channels: int) -> torch.Tensor | None:
        """Returns all files' pixels, uint8 (M, size, size, C), decoded once and kept in a cache."""
        self.files.channels = channels
        return decode_all(self.files.root, self.files.paths, self.files.scans, size, channels)


class UserImages(Images):
    """A user's map-style dataset of (image, label).

    Its pixels are never kept in memory, since an item may be another one every time.

    Args:
        dataset: its images are PIL images, uint8 arrays (H, W[, C]) or tensors (C, H, W). Labels
            are read from its attribute `targets` or `labels`, else from every item.
        name: of the dataset, for messages.
    """

    may_draw = True

    def __init__(self, dataset: Any, name: str):
        self.dataset = dataset
        self._name = name
        self.rows = np.arange(len(dataset))
        labels = getattr(dataset, "targets", None)
        if labels is None:
            labels = getattr(dataset, "labels", None)
        if labels is None:
            labels = [self._item(index)[1] for index in range(len(dataset))]
        self.labels = _to_int64(labels, name)

    def __getitem__(self, index: int) -> torch.Tensor:
        return _as_tensor(self._item(index)[0], self.name(index))

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[int(self.rows[index])]
        except Exception as error:
            raise Refused(f"{self.name(index)}: {describe(error)}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise Refused(f"{self.name(index)}: expected (image, label), got {type(item).__name__}")
        return item

    def _sample(self) -> Iterator[torch.Tensor]:
        """Yields the images for the statistics, the same ones whatever the dataset draws."""
        for index in range(0, len(self), max(1, len(self) // MAX_IMAGES_FOR_STATISTICS)):
            seeding.seed_sample(seeding.SAMPLE, index)
            yield self[index]

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels, and the shortest and the longest side of a sample."""
        shapes = {tuple(image.shape) for image in self._sample()}
        sides = [side for shape in shapes for side in shape[1:]]
        channels = {shape[0] for shape in shapes}
        if len(channels) > 1:
            raise Refused(f"{self._name}: expected one number of channels, got {sorted(channels)}")
        return channels.pop(), min(sides), max(sides)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the sums of a sample; see `ArrayImages.pixel_sums`."""
        number, sums, squares = 0.0, 0.0, 0.0
        for image in self._sample():
            values = image.double().flatten(1) * (1 if image.dtype == torch.uint8 else 255)
            number += values.shape[1]
            sums = sums + values.sum(1).numpy()
            squares = squares + values.square().sum(1).numpy()
        return number, sums, squares


def _to_int64(labels: Any, name: str) -> np.ndarray:
    """Returns the labels as int64 (N); refuses fractions, since 1.7 would become class 1."""
    plain = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
    for number, label in enumerate(plain):
        if not isinstance(label, int):
            got = f"{label!r} ({type(label).__name__}); return int(label) if it is one"
            raise Refused(f"{name}[{number}]: expected a label that is a whole number, got {got}")
    return np.asarray(plain, dtype=np.int64)


def _as_tensor(image: Any, name: str) -> torch.Tensor:
    """Returns a user's image as uint8 or float in 0..1, (C, H, W)."""
    if not isinstance(image, torch.Tensor):
        array = np.asarray(image)
        if array.ndim == 2:
            array = array[:, :, None]
        image = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    if image.ndim != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise Refused(
            f"{name}: expected a PIL image, a uint8 array (H, W, C), or a tensor (C, H, W) of uint8"
            f" or of float in 0..1, got {image.dtype} of shape {tuple(image.shape)}"
        )
    return image
