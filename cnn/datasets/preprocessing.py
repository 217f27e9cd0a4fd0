"""Preprocessing of every image for the model: its size, its channels, and its normalization."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnn.config import FITS, is_value_range
from cnn.datasets.value_range import PER_IMAGE, ValueRange
from cnn.errors import Refused

MAX_RESIZED = 20_000_000  # pixels of a resized image before its center is cropped

# A random crop is cut from a picture whose shorter side is that of the model's images times MARGIN,
# as 256 pixels are usual for 224. JPEG files are decoded to a shorter side of SHARP times that or
# more: against a full decoding, pixels then differ by 0.4 of 255 levels (mean), 1 in 100 by over 2.
MARGIN = 1.15
SHARP = 1.5


@dataclass(frozen=True)
class Form:
    """The form in which the pixels of an image are kept before augmentation.

    Attributes:
        size: height and width of the model's images in pixels.
        channels: 1 for gray, 3 for RGB.
        fit: how the image comes to a square: "crop", "pad" or "stretch".
        scaled: whether JPEG files are decoded to no more pixels than needed.
        value_range: how values of more than 8 bits become bytes.
        margin: whether the picture is larger than the model's images, for random crops.
    """

    size: int
    channels: int
    fit: str = "crop"
    scaled: bool = False
    value_range: ValueRange = PER_IMAGE
    margin: bool = False

    @property
    def least_side(self) -> int | None:
        """The shorter side in pixels to which JPEG files are decoded at least. None: in full."""
        return math.ceil(self.size * MARGIN * SHARP) if self.scaled else None

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """Returns a picture in this form.

        A picture with a margin is not enlarged. If the picture is fitted by cropping, it keeps its
        shape. Otherwise, the picture is square, and no larger than the longer side was.

        Args:
            image: (C, H, W), uint8 or float.
        """
        if not self.margin:
            return fit_image(image, self.size, self.fit)
        shorter, longer = sorted(image.shape[-2:])
        side = math.ceil(self.size * MARGIN)
        if self.fit != "crop":
            return fit_image(image, min(longer, side), self.fit)
        return image if side >= shorter else _resize_shorter(image, side)


@dataclass(frozen=True)
class Preprocessing:
    """The size, channels and normalization of the images that a model takes.

    Attributes:
        image_size: height and width in pixels.
        channels: the number of channels, such as 1 for gray and 3 for RGB.
        mean: the mean of each channel in the training images, with pixel values in 0..1.
        std: the standard deviation of each channel in the training images, with pixel values in
            0..1.
        value_range: how values of more than 8 bits become pixel values: [low, high] for the values
            that become 0 and 1. None if all training images had 8 bits per value. "per image" in
            the checkpoints of versions that had no range.
        fit: how an image comes to the square that the model takes. "crop" cuts the ends of the
            longer side away, "pad" adds black bars, and "stretch" changes the aspect.
        scaled: whether JPEG files are decoded to no more pixels than needed. False in the
            checkpoints of versions that decoded all pixels.
    """

    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    value_range: ValueRange = PER_IMAGE
    fit: str = "crop"
    scaled: bool = False

    @property
    def form(self) -> Form:
        """The form of images that are not augmented."""
        return Form(self.image_size, self.channels, self.fit, self.scaled, self.value_range)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image that the model takes: (channels, height, width)."""
        return self.channels, self.image_size, self.image_size

    @classmethod
    def from_checkpoint(cls, path: Path, saved: dict[str, Any]) -> "Preprocessing":
        """Returns the preprocessing that was saved in a checkpoint.

        Args:
            path: the path of the checkpoint, for the message of an error.
            saved: the values in the checkpoint, under "image_size", "channels", "mean" and "std".
                Other values are missing in old checkpoints.

        Raises:
            Refused: the number of means or stds is not the number of channels. Or the image size or
                a std is 0. Or the range is not one.
        """
        pre = cls(**saved)
        fits = pre.channels == len(pre.mean) == len(pre.std) and all((pre.image_size, *pre.std))
        is_range = pre.value_range in (None, PER_IMAGE) or is_value_range(pre.value_range)
        if not fits or not is_range or pre.fit not in FITS:
            expected = "an image_size, a value_range, a fit, and per channel mean and std above 0"
            raise Refused(f"{path}: preprocessing: expected {expected}, got {str(saved)[:200]}")
        return pre


def fit_image(image: torch.Tensor, size: int, fit: str = "crop") -> torch.Tensor:
    """Resizes an image to a square.

    If the given image is a square of this size, the same tensor is returned.

    Args:
        image: (C, H, W), uint8 or float.
        size: height and width of the returned image in pixels.
        fit: "crop" resizes the shorter side to `size` and crops the center. "pad" resizes the
            longer side to `size` and adds black bars on both sides. "stretch" resizes both sides.

    Returns:
        The square image, (C, size, size), of the same dtype as `image`.
    """
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    shorter, longer = min(height, width), max(height, width)
    if fit == "stretch":
        return resize(image, size, size)
    if fit == "pad":
        image = resize(image, *(max(1, round(size * side / longer)) for side in (height, width)))
        return _center_crop(image, size, size)
    if size**2 * longer > MAX_RESIZED * shorter:
        # A very long image would fill the memory once resized, though only its center is used.
        image = _center_crop(image, min(height, 16 * shorter), min(width, 16 * shorter))
    return _center_crop(_resize_shorter(image, size), size, size)


def _resize_shorter(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes an image (C, H, W) so that the shorter side has `size` pixels."""
    height, width = image.shape[-2:]
    shorter = min(height, width)
    return resize(image, size * height // shorter, size * width // shorter)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes an image bilinearly with antialiasing.

    The results are those of torchvision's transforms, whose import takes seconds.

    Args:
        image: (C, H, W), uint8 on the CPU, or float. An image that is channels last in memory is
            the fastest.
        height: height of the returned image in pixels.
        width: width of the returned image in pixels.
    """
    is_native = image.dtype in (torch.uint8, torch.float32, torch.float64)
    rows = (image if is_native else image.float()).permute(1, 2, 0)[None]
    batch = rows.permute(0, 3, 1, 2)  # channels last in memory, and as such fast, if `image` is
    resized = torch.nn.functional.interpolate(
        batch, (height, width), mode="bilinear", antialias=True
    )[0]
    return resized.to(image.dtype)


def _center_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crops the center of an image (C, H, W), and adds black where the image is smaller."""
    above = round((image.shape[-2] - height) / 2)
    left = round((image.shape[-1] - width) / 2)
    below, right = image.shape[-2] - height - above, image.shape[-1] - width - left
    if min(above, left, below, right) >= 0:
        return image[..., above : above + height, left : left + width]
    return torch.nn.functional.pad(image, (-left, -right, -above, -below))  # negative ones crop


class Normalize:
    """A function that normalizes a batch of images.

    The function subtracts the mean of each channel and divides by the std of the channel.

    Args:
        preprocessing: image size, mean and std.
        device: the device of the images.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device):
        mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device)
        std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device)
        # Arithmetic on rows of W * C numbers is vectorized, on the 3 channels alone it is not. On
        # one CPU thread, rows are 4 times as fast at 32 pixels, and twice as fast at 224.
        scale = (1 / std).repeat(preprocessing.image_size)  # W * C
        self._scale_bytes, self._scale_floats = scale / 255, scale
        self._shift = (-mean / std).repeat(preprocessing.image_size)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalizes a batch of images and leaves the given images unchanged.

        Args:
            images: (N, C, H, W), uint8 or float in 0..1.

        Returns:
            A new tensor, float32 (N, C, H, W), channels last in memory.
        """
        scale = self._scale_bytes if images.dtype == torch.uint8 else self._scale_floats
        images = images.permute(0, 2, 3, 1)  # N, H, W, C
        batch = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
        batch.flatten(-2).mul_(scale).add_(self._shift)
        return batch.permute(0, 3, 1, 2)
