"""What is done to every image before the model sees it: its size, its channels, mean and std."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnn.errors import Refused

MAX_RESIZED = 20_000_000  # pixels of an image before its middle is cut out


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image before the model sees it; a checkpoint carries it."""

    image_size: int
    channels: int
    mean: list[float]  # a channel, of values in 0..1
    std: list[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image that the model takes: channels, height, width."""
        return self.channels, self.image_size, self.image_size

    @classmethod
    def from_checkpoint(cls, path: Path, saved: dict[str, Any]) -> "Preprocessing":
        """What a checkpoint says.

        Raises:
            Refused: it does not fit together.
        """
        made = cls(**saved)
        if not made.channels == len(made.mean) == len(made.std) or 0 in (
            made.image_size,
            *made.std,
        ):
            raise Refused(
                f"{path}: preprocessing: expected an image_size, and for each of the channels a mean"
                f" and a std above 0, got {str(saved)[:200]}"
            )
        return made


def resize_and_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes the shorter side to `size` and cuts the middle out; an image of that size stays.

    Args:
        image: (C, H, W), uint8 as a rule.
    """
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    from torchvision.transforms.v2 import functional

    shorter = min(height, width)
    if size**2 * max(height, width) > MAX_RESIZED * shorter:
        # A line of pixels: made as wide as that, it would fill the memory, to be thrown away.
        image = functional.center_crop(image, [min(height, 16 * shorter), min(width, 16 * shorter)])
    return functional.center_crop(functional.resize(image, [size], antialias=True), [size])


class Normalize:
    """Pixels as the model wants them: float, mean 0 and std 1 over the training images."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device):
        mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device)
        std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device)
        self.scale = (1 / std).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)
        self._rows: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), uint8 or float in 0..1, to normalised float32, channels last."""
        is_bytes = images.dtype == torch.uint8
        if images.is_contiguous(memory_format=torch.channels_last):
            # A row of pixels at once: arithmetic over the few channels alone is not vectorised.
            number, channels, height, width = images.shape
            scale, shift = self._for_rows(is_bytes, width)
            rows = images.permute(0, 2, 3, 1).reshape(number, height, width * channels)
            rows = rows.float().mul_(scale).add_(shift)
            return rows.view(number, height, width, channels).permute(0, 3, 1, 2)
        scale = self.scale / 255 if is_bytes else self.scale
        images = images.float().mul_(scale).add_(self.shift)
        return images.contiguous(memory_format=torch.channels_last)

    def stacked(self, images: list[torch.Tensor]) -> torch.Tensor:
        """The same of images (C, H, W), each while the processor has it at hand.

        In a loader process the batch is written where it would be copied to: into shared memory.
        """
        channels, height, width = images[0].shape
        shape = (len(images), height, width, channels)
        if torch.utils.data.get_worker_info() is None:
            batch = torch.empty(shape)
        else:  # as torch's own collate functions do
            shared = torch.empty(0)._typed_storage()._new_shared(math.prod(shape))
            batch = torch.empty(0).new(shared).view(shape)
        batch = batch.permute(0, 3, 1, 2)  # N, C, H, W; channels last
        for place, image in zip(batch, images):
            place.copy_(self(image[None])[0])
        return batch

    def _for_rows(self, is_bytes: bool, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift for every number of a row: (width * C) each."""
        if (is_bytes, width) not in self._rows:
            scale = self.scale / 255 if is_bytes else self.scale
            pair = (scale.flatten().repeat(width), self.shift.flatten().repeat(width))
            self._rows[is_bytes, width] = pair
        return self._rows[is_bytes, width]
