"""Preprocessing of every image for the model: its size, its channels, and its normalization."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnn.config import is_value_range
from cnn.datasets.value_range import PER_IMAGE, ValueRange
from cnn.errors import Refused

MAX_RESIZED = 20_000_000  # pixels of a resized image before its center is cropped


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
    """

    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    value_range: ValueRange = PER_IMAGE

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
                The value under "value_range" is missing in old checkpoints.

        Raises:
            Refused: the number of means or stds is not the number of channels. Or the image size or
                a std is 0. Or the range is not one.
        """
        pre = cls(**saved)
        fits = pre.channels == len(pre.mean) == len(pre.std) and all((pre.image_size, *pre.std))
        is_range = pre.value_range in (None, PER_IMAGE) or is_value_range(pre.value_range)
        if not fits or not is_range:
            expected = "an image_size, a value_range, and per channel a mean and a std above 0"
            raise Refused(f"{path}: preprocessing: expected {expected}, got {str(saved)[:200]}")
        return pre


def resize_and_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes an image and crops the square in the center.

    After resizing, the shorter side has `size` pixels. If the given image is a square of this size,
    the same tensor is returned.

    Args:
        image: (C, H, W), uint8 or float.
        size: height and width of the returned image in pixels.

    Returns:
        The square image, (C, size, size), of the same dtype as `image`.
    """
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    from torchvision.transforms.v2 import functional

    shorter = min(height, width)
    if size**2 * max(height, width) > MAX_RESIZED * shorter:
        # A very long image would fill the memory once resized, though only its center is used.
        image = functional.center_crop(image, [min(height, 16 * shorter), min(width, 16 * shorter)])
    return functional.center_crop(functional.resize(image, [size], antialias=True), [size])


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
        images = images.permute(0, 2, 3, 1)  # N, H, W, C
        batch = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        self._normalize_into(batch, images)
        return batch.permute(0, 3, 1, 2)

    def stacked(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Normalizes images one by one and stacks the images into a batch.

        The images must be on the CPU.

        Args:
            images: N images (C, H, W), uint8 or float in 0..1.

        Returns:
            A batch, float32 (N, C, H, W), channels last in memory.
        """
        # Faster than normalizing a whole batch: each image is still in the CPU's cache.
        channels, height, width = images[0].shape
        batch = torch.empty(len(images), height, width, channels, dtype=torch.float32)
        for target, image in zip(batch, images):
            self._normalize_into(target, image.permute(1, 2, 0))
        return batch.permute(0, 3, 1, 2)

    def _normalize_into(self, target: torch.Tensor, images: torch.Tensor) -> None:
        """Normalizes images and writes the result into another tensor.

        Args:
            target: the tensor to write into, float32 (..., H, W, C), contiguous.
            images: the images to normalize, (..., H, W, C), uint8 or float in 0..1.
        """
        scale = self._scale_bytes if images.dtype == torch.uint8 else self._scale_floats
        target.copy_(images).flatten(-2).mul_(scale).add_(self._shift)
