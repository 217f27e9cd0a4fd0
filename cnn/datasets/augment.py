"""Random changes to training images: one by one, and on whole batches.

What a change draws is a function of (seed, epoch, image) and of its own name, so that another one
beside it changes nothing. torchvision is imported only where one of its changes is used.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cnn.config.settings import AugmentationConfig
from cnn.datasets.order import Key
from cnn.datasets.preprocessing import resize_and_crop
from cnn.utils import seeding
from cnn.utils.importing import import_object

Transform = Callable[[torch.Tensor], torch.Tensor]  # image (C, H, W), uint8 as a rule, to another

DRAWS = 2  # the way in which changes draw; counted up with it, and told where a run goes on
RESIZED_CROP_SCALE = (0.35, 1.0)  # Wightman et al. (2021); gentler than Inception's 0.08


def _v2() -> Any:
    from torchvision.transforms import v2

    return v2


# From the settings and the model's image size; all draw from torch's global generator.
AUGMENTATIONS: dict[str, Callable[[AugmentationConfig, int], Transform]] = {
    "crop": lambda cfg, size: functools.partial(crop, size=size),
    "flip": lambda cfg, size: flip,
    "rotate": lambda cfg, size: _v2().RandomRotation(10, _v2().InterpolationMode.BILINEAR),
    "color": lambda cfg, size: _v2().ColorJitter(0.2, 0.2, 0.2),
    "resized_crop": lambda cfg, size: _v2().RandomResizedCrop(
        size, tuple(cfg.scale or RESIZED_CROP_SCALE), antialias=True
    ),
    "erase": lambda cfg, size: erase,
}


class Augmentation:
    """Changes an image in the ways that are set, in their order.

    They see images of the model's size, but for `resized_crop`, which cuts it out of the whole.
    """

    def __init__(self, changes: Sequence[AugmentationConfig], size: int, seed: int):
        changes = sorted(changes, key=lambda cfg: cfg.name != "resized_crop")  # that one first
        names = [cfg.name for cfg in changes]
        self.size, self.seed, self.fits_first = size, seed, "resized_crop" not in names
        self._changes = [
            # Where one comes twice, the second draws otherwise.
            (_build(cfg, size), cfg.name, (name_key(cfg.name), names[:number].count(cfg.name)))
            for number, cfg in enumerate(changes)
        ]

    def __call__(self, image: torch.Tensor, key: Key) -> torch.Tensor:
        """The image (C, H, W) as an epoch has it, (C, size, size)."""
        if self.fits_first:
            image = resize_and_crop(image, self.size)
        for change, name, words in self._changes:
            # What others have written may draw from any generator.
            seed = seeding.seed_torch if name in AUGMENTATIONS else seeding.seed_sample
            seed(self.seed, seeding.AUGMENT, *key, *words)
            image = change(image)
        return resize_and_crop(image, self.size)


def name_key(name: str) -> int:
    """A name as a word of a key."""
    return zlib.crc32(name.encode())


def _build(cfg: AugmentationConfig, size: int) -> Transform:
    if cfg.name in AUGMENTATIONS:
        return AUGMENTATIONS[cfg.name](cfg, size)
    found = import_object(cfg.name, "data.augment")
    return found() if isinstance(found, type) else found


def crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Moves an image by an eighth at most, black beyond its edges: torchvision's RandomCrop.

    The same draws and the same pixels, in a third of the time.
    """
    padding = padding_of(size)
    shape = image.shape[-2:]
    top, left = (_draw(side + 2 * padding - size) - padding for side in shape)  # of the source
    part = image[..., max(top, 0) : top + size, max(left, 0) : left + size]
    if part.shape[-2:] == (size, size):
        return part
    moved = image.new_zeros(*image.shape[:-2], size, size)
    y, x = max(-top, 0), max(-left, 0)
    moved[..., y : y + part.shape[-2], x : x + part.shape[-1]] = part
    return moved


def _draw(most: int) -> int:
    return int(torch.randint(0, most + 1, ())) if most > 0 else 0


def padding_of(size: int) -> int:
    """An eighth: 4 pixels at 32, as He et al. (2016) for CIFAR."""
    return max(1, size // 8)


def flip(image: torch.Tensor) -> torch.Tensor:
    """Turns every other image round, left to right: torchvision's RandomHorizontalFlip."""
    return image if torch.rand(1) >= 0.5 else image.flip(-1)


# -- cutout (DeVries and Taylor, 2017) ----------------------------------------------------------

ERASED = 0.5  # side of the erased square over the image's
ERASE_PROBABILITY = 0.5


def erase(image: torch.Tensor) -> torch.Tensor:
    """Makes a square of every other image (C, H, W) black, drawn from torch's global generator."""
    return image * ~erased(torch.rand(1, 3), *image.shape[-2:])


def erased(draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where images lose a square, its middle anywhere: bool (N, H, W).

    Args:
        draws: in [0, 1), (N, 3): whether at all, and the middle's y and x.
    """

    def near(draw: torch.Tensor, side: int) -> torch.Tensor:  # N, side
        pixels = torch.arange(side, device=draw.device) + 0.5
        return (pixels - draw[:, None] * side).abs() < ERASED * side / 2

    square = near(draws[:, 1], height)[:, :, None] & near(draws[:, 2], width)[:, None, :]
    return square & (draws[:, 0] < ERASE_PROBABILITY)[:, None, None]


# -- the same for whole batches ---------------------------------------------------------------

BATCH_DRAWS = {"crop": 2, "flip": 1, "erase": 3}  # numbers for each image


class BatchAugmentation:
    """Gathers images from a store and crops, flips and erases them on the way, a batch at a time.

    Args:
        store: all images, uint8 (M, S, S, C), on the device.
        names: of BATCH_DRAWS; none of them: images come as they are.
    """

    def __init__(self, store: torch.Tensor, names: Sequence[str]):
        self.names = [name for name in BATCH_DRAWS if name in names]
        self.size, self.channels = store.shape[1], store.shape[3]
        self._store = store
        self._sides = torch.arange(self.size, device=store.device)
        self._padding = padding_of(self.size)

    def draws(self, number: int, seed: int, epoch: int) -> torch.Tensor:
        """What is random about each of so many images in an epoch, in [0, 1): (number, draws).

        By a counter-based generator (Philox; Salmon et al., SC 2011) for each change.
        """
        tables = []
        for name in self.names:
            key = seeding.mix(seed, seeding.AUGMENT, epoch, name_key(name))
            rng = np.random.Generator(np.random.Philox(key=key))
            tables.append(rng.random((number, BATCH_DRAWS[name]), dtype=np.float32))
        return torch.from_numpy(np.concatenate(tables, axis=1))

    def __call__(self, rows: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images uint8 (N, C, S, S), channels last.

        Args:
            rows: in the store (N).
            draws: of these images, as `draws` gives them; None changes nothing.
        """
        if draws is None or not self.names:
            return self._store.index_select(0, rows).permute(0, 3, 1, 2)
        of = dict(zip(self.names, draws.split([BATCH_DRAWS[name] for name in self.names], dim=1)))
        is_flipped = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        offsets = torch.zeros((len(rows), 2), dtype=torch.int64, device=rows.device)  # N, 2: y, x
        if "flip" in of:
            is_flipped = of["flip"][:, 0] < 0.5
        if "crop" in of:
            offsets = (of["crop"] * (2 * self._padding + 1)).long() - self._padding
        move = self._copy if self._store.device.type == "cpu" else self._gather
        images = move(rows, is_flipped, offsets)
        if "erase" in of:
            images *= ~erased(of["erase"], self.size, self.size).unsqueeze(3)
        return images.permute(0, 3, 1, 2)

    def _gather(
        self, rows: torch.Tensor, is_flipped: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """All pixels at once by their place in the store: (N, S, S, C), black outside the source."""
        size = self.size
        x = torch.where(is_flipped[:, None], size - 1 - self._sides, self._sides)
        y, x = self._sides + offsets[:, :1], x + offsets[:, 1:]  # N, S; of the source
        near_y, near_x = y.clamp(0, size - 1), x.clamp(0, size - 1)
        places = (rows[:, None] * size + near_y)[:, :, None] * size + near_x[:, None, :]  # N, S, S
        images = self._store.view(-1, self.channels).index_select(0, places.view(-1))
        images = images.view(len(rows), size, size, self.channels)
        if "crop" in self.names:
            images *= ((y == near_y)[:, :, None] & (x == near_x)[:, None, :]).unsqueeze(3)
        return images

    def _copy(
        self, rows: torch.Tensor, is_flipped: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """The same, a rectangle an image: on a CPU that is several times as fast."""
        size, store = self.size, self._store.numpy()
        images = np.zeros((len(rows), *store.shape[1:]), np.uint8)
        draws = zip(images, rows.tolist(), is_flipped.tolist(), offsets.tolist())
        for image, row, flipped, (dy, dx) in draws:
            top, bottom = max(0, -dy), min(size, size - dy)  # what the source has something for
            left, right = max(0, -dx), min(size, size - dx)
            source = store[row, top + dy : bottom + dy, left + dx : right + dx]
            if flipped:
                image[top:bottom, size - right : size - left] = source[:, ::-1]
            else:
                image[top:bottom, left:right] = source
        return torch.from_numpy(images)
