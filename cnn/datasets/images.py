"""Labelled images from three sources: an array in memory, files, or a user's own dataset.

There is a class for each source. An object of it contains the labels (int64, one per image), and
returns an image by its index as a tensor (C, H, W), uint8 or float in 0..1. Its methods return the
name of an image, a subset of the images, and the sums from which the mean and std of the pixels
follow.
"""

import copy
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from cnn.datasets.cache import array_hash, content_hash
from cnn.datasets.decode import open_image, to_array
from cnn.datasets.pictures import Pictures
from cnn.datasets.preprocessing import Form
from cnn.datasets.scan import scan
from cnn.datasets.value_range import PER_IMAGE, ValueRange
from cnn.errors import BadImage, Refused, describe
from cnn.utils import seeding

MAX_IMAGES_FOR_STATISTICS = 2_000  # fewer than twice as many are read of a user's dataset


class Images:
    """Labelled images, which are a whole dataset or a subset of a dataset.

    A subclass reads images from one kind of source, such as files. All subsets of a dataset share
    the pixels.

    Attributes:
        labels: the index of each image's class, int64 (N). N is the number of images in this
            object.
        rows: the index of each image in the whole dataset, int64 (N).
        skip: whether an image that cannot be read during the run is left out of the batch. If
            false, the run ends with an error.
        may_draw: whether reading an image can draw from the global random generators.
        num_decoded: the number of images of the whole dataset; 0 if they cannot be kept in memory.
        group_names: the name of each image's group (N), all images of which stay in one split; None
            without groups.
    """

    labels: np.ndarray
    rows: np.ndarray
    skip = may_draw = False
    num_decoded = 0
    group_names: np.ndarray | None = None
    _name: str

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns an image's name, such as "digits[17]".

        The name consists of the dataset's name and the image's index in the whole dataset.

        Args:
            index: index of the image in this object, which can be a subset of the dataset.
        """
        return f"{self._name}[{self.rows[index]}]"

    def subset(self, indices: np.ndarray) -> Self:
        """Returns some of the images as a new object, without copying pixels.

        Args:
            indices: the indices of the images to return. An index is the position of an image in
                this object.
        """
        part = copy.copy(self)
        part.rows, part.labels = self.rows[indices], self.labels[indices]
        return part

    def checksum(self) -> int:
        """Returns a checksum of the dataset's pixels, or 0 without a checksum.

        This base class always returns 0. A subclass that can read all pixels quickly overrides this
        method.
        """
        return 0

    def identities(self) -> np.ndarray:
        """Returns a number for each image, uint64 (N).

        Images with equal pixels have equal numbers, in all subsets of a dataset. This base class,
        which does not know the pixels, returns a different number for each name.
        """
        names = (self.name(index).encode() for index in range(len(self)))
        return np.array([content_hash(io.BytesIO(name)) for name in names], np.uint64)

    def picture(self, index: int, form: Form) -> torch.Tensor:
        """Returns an image in the form in which it is augmented or evaluated, (C, H, W).

        Args:
            index: index of the image in this object.
            form: the form of the picture.
        """
        return form.apply(self[index])

    def is_kept(self, _: Form) -> bool:
        """Returns whether the pictures in a form are in memory or in the cache, all of them."""
        return True

    def store(self, form: Form) -> tuple[torch.Tensor, np.ndarray]:
        """Returns the pictures of this object in one tensor, in memory.

        Args:
            form: the form of the pictures, without a margin.

        Returns:
            Two values. The first value is pictures, uint8 (M, size, size, C), which can be more
            than those of this object. The second value is the index of each of this object's images
            in the first value (N).

        Raises:
            Refused: a file can no longer be decoded.
        """
        try:
            pictures = [self.picture(i, form).permute(1, 2, 0) for i in range(len(self))]
        except BadImage as bad:
            raise Refused(f"data.root: {bad}; it was read a moment ago") from None
        return torch.stack(pictures), np.arange(len(self))


class ArrayImages(Images):
    """Images in memory, all of the same size.

    Args:
        pixels: the N images, uint8 (N, C, H, W).
        labels: the index of each image's class, N integers.
        name: name of the dataset, for messages.
    """

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: Sequence[int], name: str):
        pixels = torch.as_tensor(pixels)
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous()  # M, H, W, C; shared by all subsets
        self._identities = np.array(list(map(array_hash, self.pixels.numpy())), np.uint64)  # M
        self.num_decoded = len(pixels)
        self.rows = np.arange(self.num_decoded)
        self.labels = np.asarray(labels, dtype=np.int64)
        self._name = name

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[self.rows[index]].permute(2, 0, 1)

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels and the sides of the images.

        Returns:
            Three values: the number of channels, the shorter side in pixels, and the longer side in
            pixels.
        """
        _, height, width, channels = self.pixels.shape
        return channels, min(height, width), max(height, width)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the sums that give the mean and std of each channel.

        Returns:
            Three values. The first value is the number of pixels in all images of this object
            together. The second value is the sum of each channel's pixel values (0 to 255), shape
            (C). The third value is the sum of the squares of the pixel values of each channel,
            shape (C).
        """
        height, width, channels = self.pixels.shape[1:]
        counts = np.zeros((channels, 256))
        for start in range(0, len(self), 4_096):
            part = self.pixels[self.rows[start : start + 4_096]].numpy()
            for channel in range(channels):
                counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
        values = np.arange(256.0)
        return float(len(self) * height * width), counts @ values, counts @ values**2

    def checksum(self) -> int:
        """Returns a CRC-32 of the pixels of the whole dataset.

        The whole dataset is covered even if this object is a subset.
        """
        return zlib.crc32(self.pixels.numpy())

    def identities(self) -> np.ndarray:
        """Returns a number for each image, the same for images with the same pixels, uint64 (N)."""
        return self._identities[self.rows]

    def store(self, form: Form) -> tuple[torch.Tensor, np.ndarray]:
        """Returns the pictures of the whole dataset, if they have the size of the form.

        Args:
            form: the form of the pictures, without a margin.
        """
        is_fit = self.pixels.shape[1:3] == (form.size, form.size)
        return (self.pixels, self.rows) if is_fit else super().store(form)


@dataclass
class Files:
    """The image files of a whole dataset, shared by all splits of the dataset.

    Attributes:
        root: the folder or CSV file of the dataset.
        paths: the image files of all splits.
        scans: one row per file, of the dtype `cnn.datasets.scan.SCAN`. A row has the image's size
            and pixel sums.
        pictures: for each form in which pictures are needed, those that are in the cache.
        skip: whether a file that cannot be read during the run is left out of the batch. If false,
            the run ends with an error.
        value_range: how values of more than 8 bits become bytes.
        cache_gb: how many GB of pictures the cache may contain.
        ranged: the rows as in `scans`, with sums that follow from `value_range`. None if no image
            has more than 8 bits.
        groups: the name of the group of each file. None without groups.
    """

    root: Path
    paths: list[Path]
    scans: np.ndarray
    pictures: list[Pictures]
    skip: bool = False
    value_range: ValueRange = PER_IMAGE
    cache_gb: float | None = None
    ranged: np.ndarray | None = None
    groups: np.ndarray | None = None

    @property
    def form(self) -> Form:
        """The form of the pictures for evaluation."""
        return self.pictures[0].form

    def subset(self, rows: np.ndarray) -> "Files":
        """Returns some of the files, before it is said how they are decoded.

        Args:
            rows: the indices of the files to return (N).
        """
        paths = [self.paths[row] for row in rows]
        pictures = [pictures.subset(rows) for pictures in self.pictures]
        groups = None if self.groups is None else self.groups[rows]
        changes = {"paths": paths, "pictures": pictures, "groups": groups}
        return replace(self, scans=self.scans[rows], **changes)


class FileImages(Images):
    """Images in files, where every reading of an image decodes the file.

    Args:
        files: the files of the whole dataset.
        labels: the index of each image's class, N integers. N is the number of images in this
            object.
        rows: the index of each image's file in `files.paths` (N). If None, the images are those of
            all files, in the order of `files.paths`.
    """

    def __init__(self, files: Files, labels: Sequence[int], rows: np.ndarray | None = None):
        self.files, self.skip = files, files.skip
        self.num_decoded = len(files.paths)
        self.rows = np.arange(self.num_decoded) if rows is None else rows
        self.labels = np.asarray(labels, dtype=np.int64)

    @property
    def group_names(self) -> np.ndarray | None:
        """The name of each image's group (N). None without groups."""
        return None if self.files.groups is None else self.files.groups[self.rows]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._decode(index)

    def _decode(self, index: int, least_side: int | None = None) -> torch.Tensor:
        path, files = self.files.paths[self.rows[index]], self.files
        try:
            image = open_image(path, least_side)
            pixels = to_array(image, files.form.channels, files.value_range)
        except BadImage as bad:
            raise BadImage(f"{path}: {bad}") from None
        return torch.from_numpy(pixels)

    def name(self, index: int) -> str:
        """Returns the path of an image.

        Args:
            index: index of the image in this object, which can be a subset of the dataset.
        """
        return str(self.files.paths[self.rows[index]])

    def decode_as(self, channels: int, value_range: ValueRange) -> None:
        """Sets how the files of the whole dataset are decoded from now on.

        Args:
            channels: 1 for gray, 3 for RGB. Other numbers change nothing.
            value_range: how values of more than 8 bits become bytes.

        Raises:
            Refused: a file with more than 8 bits can no longer be decoded.
        """
        files, is_deep = self.files, bool((self.files.scans["kind"] != b"").any())
        own = {"value_range": value_range if is_deep else None}  # others do not depend on it
        own |= {"channels": channels} if channels in (1, 3) else {}
        wanted = [(replace(kept.form, **own), kept.is_wanted) for kept in files.pictures]
        files.value_range = value_range
        if any(form != kept.form for (form, _), kept in zip(wanted, files.pictures)):
            ranged = value_range if isinstance(own["value_range"], list) else PER_IMAGE
            common = (files.root, files.paths, lambda _: wanted)
            found = scan(*common, value_range=ranged, cache_gb=files.cache_gb)
            files.ranged, bad, files.pictures = found
            for path, reason in bad.items():
                raise Refused(f"data.root: {path}: read a moment ago, and now: {reason}")
            if (files.ranged["content"] != files.scans["content"]).any():
                raise Refused("data.root: a file changed while the run started; start it again")

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels and the size of the pictures.

        Returns:
            Three values. The first value is the number of channels to which the files are decoded.
            The second and third values are the height and width of the pictures for evaluation.
        """
        form = self.files.form
        return form.channels, form.size, form.size

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the sums that give the mean and std of each channel.

        Returns:
            Three values. The first value is the number of pixels in all images of this object
            together. The second value is the sum of each channel's pixel values (0 to 255), shape
            (C). The third value is the sum of the squares of the pixel values of each channel,
            shape (C). C is 1 or 3, the number of channels to which the files are decoded.
        """
        files = self.files
        scans = (files.scans if files.ranged is None else files.ranged)[self.rows]
        number = float(scans["count"].sum())
        channels = [3] if files.form.channels == 1 else [0, 1, 2]
        return number, scans["sums"].sum(axis=0)[channels], scans["squares"].sum(axis=0)[channels]

    def checksum(self) -> int:
        """Returns a CRC-32 of the pixel sums of all files in the dataset.

        The whole dataset is covered even if this object is a subset. No file is decoded.
        """
        return zlib.crc32(np.ascontiguousarray(self.files.scans["sums"]))

    def identities(self) -> np.ndarray:
        """Returns a number for each image, the same for images with the same pixels, uint64 (N)."""
        return self.files.scans["pixels"][self.rows]

    def picture(self, index: int, form: Form) -> torch.Tensor:
        """Returns an image in the form in which it is augmented or evaluated, (C, H, W).

        The file is decoded only if the picture is not in the cache.

        Args:
            index: index of the image in this object.
            form: the form of the picture.

        Raises:
            BadImage: the file cannot be decoded.
        """
        kept = self._kept(form)
        picture = kept.get(self.rows[index]) if kept is not None else None
        return form.apply(self._decode(index, form.least_side)) if picture is None else picture

    def is_kept(self, form: Form) -> bool:
        """Returns whether the pictures in a form are in the cache, all of them."""
        kept = self._kept(form)
        return kept is not None and bool(kept.is_kept[self.rows].all())

    def _kept(self, form: Form) -> Pictures | None:
        form = replace(form, value_range=self.files.form.value_range)
        return next((kept for kept in self.files.pictures if kept.form == form), None)


class UserImages(Images):
    """The images of a user's map-style dataset, whose items are (image, label).

    The pixels are never kept in memory, since an item can be another image at every reading.

    Args:
        dataset: the user's dataset. Images are PIL images, uint8 arrays (H, W) or (H, W, C), or
            tensors (C, H, W). A tensor is uint8 or float in 0..1. Labels are in the attribute
            `targets` or `labels`. Without these attributes, every item is read once for the label.
        name: name of the dataset, for messages.
    """

    may_draw = True

    def __init__(self, dataset: Any, name: str):
        self.dataset = dataset
        self._name = name
        self.rows = np.arange(len(dataset))
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
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
        """Yields images at equal distances in the dataset, for statistics.

        All images of a small dataset are yielded, but never 4,000 images or more. The global random
        generators are seeded before each image. So random transforms in the dataset give the same
        images every time.
        """
        for index in range(0, len(self), max(1, len(self) // MAX_IMAGES_FOR_STATISTICS)):
            seeding.seed_sample(seeding.SAMPLE, index)
            yield self[index]

    def sizes(self) -> tuple[int, int, int]:
        """Returns the number of channels and the sides of the images.

        In a large dataset, only some images are read.

        Returns:
            Three values: the number of channels, the shortest side in pixels, and the longest side
            in pixels.

        Raises:
            Refused: the images differ in the number of channels, or an image cannot be read.
        """
        shapes = {tuple(image.shape) for image in self._sample()}
        sides = [side for shape in shapes for side in shape[1:]]
        channels = {shape[0] for shape in shapes}
        if len(channels) > 1:
            raise Refused(f"{self._name}: expected one number of channels, got {sorted(channels)}")
        return channels.pop(), min(sides), max(sides)

    def pixel_sums(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the sums that give the mean and std of each channel.

        In a large dataset, only some images are read. The values of float images are first
        multiplied by 255.

        Returns:
            Three values. The first value is the number of pixels in the images that were read. The
            second value is the sum of each channel's pixel values (0 to 255), shape (C). The third
            value is the sum of the squares of the pixel values of each channel, shape (C).

        Raises:
            Refused: an image cannot be read.
        """
        number, sums, squares = 0.0, 0.0, 0.0
        for image in self._sample():
            values = image.double().flatten(1) * (1 if image.dtype == torch.uint8 else 255)
            number += values.shape[1]
            sums = sums + values.sum(1).numpy()
            squares = squares + values.square().sum(1).numpy()
        return number, sums, squares


def _to_int64(labels: Any, name: str) -> np.ndarray:
    """Converts labels to an array of integers.

    Args:
        labels: N labels. A label is an integer, or an array or tensor of one integer without
            dimensions.
        name: name of the dataset, for the message of the error.

    Returns:
        The labels, int64 (N).

    Raises:
        Refused: a label is not an integer, such as 1.7.
    """
    plain = [label.tolist() if hasattr(label, "tolist") else label for label in labels]
    for index, label in enumerate(plain):
        if not isinstance(label, int):
            got = f"{label!r} ({type(label).__name__}); return int(label) if it is one"
            raise Refused(f"{name}[{index}]: expected a label that is a whole number, got {got}")
    return np.asarray(plain, dtype=np.int64)


def _as_tensor(image: Any, name: str) -> torch.Tensor:
    """Converts an image of a user's dataset to a tensor.

    Args:
        image: a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W).
        name: name of the image, for the message of the error.

    Returns:
        The image, (C, H, W), uint8 or float.

    Raises:
        Refused: the number of dimensions is wrong, or the values are neither uint8 nor float.
    """
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
