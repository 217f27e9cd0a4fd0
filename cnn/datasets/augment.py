"""Random augmentation of training images, one by one or in whole batches on the device.

The random numbers of an augmentation are a function of the seed, the epoch, the image and the name
of the augmentation. So the numbers stay the same if another augmentation is added. torchvision is
imported only when a configured augmentation needs it.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn.config.settings import AugmentationConfig
from cnn.datasets.order import Key
from cnn.datasets.preprocessing import fit_image as resize_and_crop
from cnn.utils import seeding
from cnn.utils.importing import import_object

Transform = Callable[[Tensor], Tensor]  # from an image (C, H, W) to another, mostly uint8

DRAWS = 2  # version of the random draws; a resumed run logs it if its checkpoint has another
RESIZED_CROP_SCALE = (0.35, 1.0)  # as in Wightman et al. (2021); Inception crops down to 0.08


def _v2() -> Any:
    from torchvision.transforms import v2

    return v2


# Each entry builds a transform from its settings and the model's image size in pixels. The
# transforms draw from torch's global generator.
AUGMENTATIONS: dict[str, Callable[[AugmentationConfig, int], Transform]] = {
    "crop": lambda _, size: functools.partial(crop, size=size),
    "flip": lambda *_: flip,
    "rotate": lambda *_: _v2().RandomRotation(10, _v2().InterpolationMode.BILINEAR),
    "color": lambda *_: _v2().ColorJitter(0.2, 0.2, 0.2),
    "resized_crop": lambda cfg, size: _v2().RandomResizedCrop(
        size, tuple(cfg.scale or RESIZED_CROP_SCALE), antialias=True
    ),
    "erase": lambda *_: erase,
}


class Augmentation:
    """A function that augments one training image at random.

    First, the function resizes and crops the image to the model's image size. Then the function
    applies the augmentations in the order of `augment`. However, the augmentation "resized_crop"
    always comes first and replaces the resizing.

    Args:
        augment: name and settings of each augmentation.
        size: height and width of the model's images in pixels.
        seed: the seed of the run.
    """

    def __init__(self, augment: Sequence[AugmentationConfig], size: int, seed: int):
        augment = sorted(augment, key=lambda cfg: cfg.name != "resized_crop")
        names = [cfg.name for cfg in augment]
        self.size, self.seed, self._resize_first = size, seed, "resized_crop" not in names
        self._transforms = [
            # An augmentation that is listed twice draws other numbers the second time.
            (_build(cfg, size), cfg.name, (name_key(cfg.name), names[:number].count(cfg.name)))
            for number, cfg in enumerate(augment)
        ]

    def __call__(self, image: Tensor, key: Key) -> Tensor:
        """Augments one image.

        The random numbers depend only on the seed of the run and on `key`.

        Args:
            image: (C, H, W), uint8 or float.
            key: (epoch, index of the image in the split). If an image can occur twice in an epoch,
                the key is (epoch, index, position in the epoch).

        Returns:
            The augmented image, (C, size, size).
        """
        if self._resize_first:
            image = resize_and_crop(image, self.size)
        for transform, name, words in self._transforms:
            # A user's augmentation can draw from any global generator, ours draw only from torch's.
            seed = seeding.seed_torch if name in AUGMENTATIONS else seeding.seed_sample
            seed(self.seed, seeding.AUGMENT, *key, *words)
            image = transform(image)
        return resize_and_crop(image, self.size)


def name_key(name: str) -> int:
    """Returns the CRC-32 of an augmentation's name.

    The CRC-32 is part of the seed of the augmentation's random numbers.
    """
    return zlib.crc32(name.encode())


def _build(cfg: AugmentationConfig, size: int) -> Transform:
    if cfg.name in AUGMENTATIONS:
        return AUGMENTATIONS[cfg.name](cfg, size)
    transform = import_object(cfg.name, "data.augment")
    return transform() if isinstance(transform, type) else transform


def crop(image: Tensor, size: int) -> Tensor:
    """Pads an image and crops a square at a random place.

    The padding is black. The padding on each side is an eighth of `size`, but at least 1 pixel.

    Args:
        image: (C, H, W).
        size: height and width of the returned image in pixels.

    Returns:
        The cropped image, (C, size, size).
    """
    # torchvision's RandomCrop with padding draws the same numbers and returns the same pixels. This
    # function is faster, and needs no torchvision.
    padding = max_shift(size)
    height, width = image.shape[-2:]
    top, left = (_randint(side + 2 * padding - size) - padding for side in (height, width))
    # A negative padding crops.
    sides = (-left, left + size - width, -top, top + size - height)
    return torch.nn.functional.pad(image, sides)


def _randint(most: int) -> int:
    return int(torch.randint(0, most + 1, ())) if most > 0 else 0


def max_shift(size: int) -> int:
    """Returns the largest number of pixels by which a random shift moves an image.

    The number is an eighth of the image's size, but at least 1. For an image of 32 pixels, the
    number is 4, as in He et al. (2016) for CIFAR.

    Args:
        size: height and width of the image in pixels.
    """
    return max(1, size // 8)


def flip(image: Tensor) -> Tensor:
    """Flips an image (C, H, W) left to right with probability 1/2.

    If the image is not flipped, the same tensor is returned. The random number is the same as in
    torchvision's RandomHorizontalFlip.
    """
    return image if torch.rand(1) >= 0.5 else image.flip(-1)


# -- cutout (DeVries and Taylor, 2017) ----------------------------------------------------------

ERASED = 0.5  # side of the erased square as a fraction of the image's side
ERASE_PROBABILITY = 0.5


def erase(image: Tensor) -> Tensor:
    """Makes a random square of an image (C, H, W) black with probability 1/2.

    The method is cutout (DeVries and Taylor, 2017). The square is half as wide as the image. The
    square can reach beyond the image's border. The given image stays unchanged, and a new image is
    returned.
    """
    return image * ~erased_pixels(torch.rand(1, 3), *image.shape[-2:])


def erased_pixels(draws: Tensor, height: int, width: int) -> Tensor:
    """Computes which pixels of each image are to be erased.

    The erased pixels of an image are a square, or none.

    Args:
        draws: random numbers between 0 and 1, (N, 3), three for each of N images. An image is
            erased if the first of the three numbers is below 1/2. The second number is the y of the
            square's center, as a fraction of the height. The third number is the x of the center,
            as a fraction of the width.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        A mask, bool (N, height, width), true for the pixels to erase.
    """

    def near(draw: Tensor, side: int) -> Tensor:  # N, side
        pixels = torch.arange(side, device=draw.device) + 0.5
        return (pixels - draw[:, None] * side).abs() < ERASED * side / 2

    square = near(draws[:, 1], height)[:, :, None] & near(draws[:, 2], width)[:, None, :]
    return square & (draws[:, 0] < ERASE_PROBABILITY)[:, None, None]


# -- whole batches ----------------------------------------------------------------------------

BATCH_DRAWS = {"crop": 2, "flip": 1, "erase": 3}  # random numbers per image


class BatchAugmentation:
    """A function that takes images from a store and augments the images.

    Args:
        store: the M images of the whole dataset, uint8 (M, S, S, C). Batches are computed on the
            device of the store.
        names: the names of the augmentations to apply. Names other than "crop", "flip" and "erase"
            are ignored. Crop is always applied first, then flip, then erase.
    """

    def __init__(self, store: Tensor, names: Sequence[str]):
        self.names = [name for name in BATCH_DRAWS if name in names]
        self.size, self.channels = store.shape[1], store.shape[3]
        self._store = store
        self._sides = torch.arange(self.size, device=store.device)

    def draws(self, number: int, seed: int, epoch: int) -> Tensor:
        """Draws the random numbers for all images of one epoch.

        The numbers depend only on the seed of the run, the epoch and the names of the
        augmentations. There must be at least one augmentation.

        Args:
            number: how many images the epoch has.
            seed: the seed of the run.
            epoch: the epoch, counted from 1.

        Returns:
            A table with one row per image, float32 (number, D), on the CPU. The numbers are uniform
            in [0, 1). D is the sum over the applied augmentations: 2 for crop, 1 for flip, 3 for
            erase.
        """
        tables = []
        for name in self.names:
            key = seeding.mix(seed, seeding.AUGMENT, epoch, name_key(name))
            rng = np.random.Generator(np.random.Philox(key=key))
            tables.append(rng.random((number, BATCH_DRAWS[name]), dtype=np.float32))
        return torch.from_numpy(np.concatenate(tables, axis=1))

    def __call__(self, rows: Tensor, draws: Tensor | None) -> Tensor:
        """Takes a batch of images from the store and augments the images.

        Args:
            rows: the index of each image in the store, int64 (N).
            draws: the random numbers, float32, one row per image. The rows come from the table that
                the method `draws` returns. If `draws` is None, the images are not augmented.

        Returns:
            N images of S x S pixels, uint8 (N, C, S, S), channels last in memory.
        """
        if draws is None or not self.names:
            return self._store.index_select(0, rows).permute(0, 3, 1, 2)
        splits = draws.split([BATCH_DRAWS[name] for name in self.names], dim=1)
        by_name, size = dict(zip(self.names, splits)), self.size
        y = x = self._sides.expand(len(rows), size)  # N, S; coordinates in the source
        if "flip" in by_name:
            x = torch.where(by_name["flip"] < 0.5, size - 1 - x, x)
        if "crop" in by_name:
            padding = max_shift(size)
            shifts = (by_name["crop"] * (2 * padding + 1)).long() - padding  # N, 2: up, left
            y, x = y + shifts[:, :1], x + shifts[:, 1:]
        near_y, near_x = y.clamp(0, size - 1), x.clamp(0, size - 1)
        pixels = (rows[:, None] * size + near_y)[:, :, None] * size + near_x[:, None, :]  # N, S, S
        images = self._store.view(-1, self.channels).index_select(0, pixels.view(-1))
        images = images.view(len(rows), size, size, self.channels)
        if "crop" in by_name:  # pixels from outside the original image are black
            images *= ((y == near_y)[:, :, None] & (x == near_x)[:, None, :]).unsqueeze(3)
        if "erase" in by_name:
            images *= ~erased_pixels(by_name["erase"], size, size).unsqueeze(3)
        return images.permute(0, 3, 1, 2)
