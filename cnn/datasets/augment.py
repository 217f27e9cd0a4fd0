"""Random augmentation of training images, in whole batches.

The random numbers of an augmentation are a function of the seed, the epoch, the image and the name
of the augmentation. So the numbers stay the same if another augmentation is added. An augmented
image depends on nothing else, such as the other images of the batch or the number of worker
processes. torchvision is imported only when a configured augmentation needs it.

A function of batches gets N images of S x S pixels, uint8 or float in 0..1, (N, S, S, C), and
returns images of the same shape and dtype. The function also gets a table of random numbers,
uniform in [0, 1), with one row per image, float32 (N, D). The given images stay unchanged.
"""

import functools
import inspect
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnn.config.settings import AugmentationConfig
from cnn.datasets import workers
from cnn.datasets.images import Images
from cnn.datasets.order import EVALUATION, Key
from cnn.datasets.preprocessing import fit_image, resize
from cnn.errors import DataFailed, Refused
from cnn.utils import seeding
from cnn.utils.importing import import_object

Pair = Sequence[float]  # the smallest and the largest value
DRAWS = 3  # version of the random draws; a resumed run logs it if its checkpoint has another


# -- functions of batches -----------------------------------------------------------------------


def crop(images: Tensor, draws: Tensor, padding: int | None = None) -> Tensor:
    """Pads images with black and crops a square of the old size at a random place.

    Args:
        images: (N, S, S, C).
        draws: random numbers (N, 2), for y and x.
        padding: pixels on each side. If None, the padding is an eighth of S, but at least 1. For an
            image of 32 pixels, an eighth is 4, as in He et al. (2016) for CIFAR.
    """
    number, size, _, channels = images.shape
    padding = max(1, size // 8) if padding is None else padding
    top, left = (draws * (2 * padding + 1)).long().split(1, dim=1)  # N, 1
    padded = torch.nn.functional.pad(images, (0, 0, *4 * [padding])).contiguous()
    side = size + 2 * padding
    # Row k consists of the `size` pixels from pixel k on. To gather rows is several times as fast
    # as to gather pixels.
    rows = padded.as_strided((number * side**2 - size + 1, size * channels), (channels, 1))
    first, y = (torch.arange(n, device=images.device) for n in (number, size))
    starts = ((first[:, None] * side + top + y) * side + left).flatten()  # N * S
    return rows.index_select(0, starts).view(images.shape)


def flip(images: Tensor, draws: Tensor, probability: float = 0.5, axis: int = 2) -> Tensor:
    """Flips some images left to right.

    Args:
        images: (N, S, S, C).
        draws: random numbers (N, 1). An image with a number below `probability` is flipped.
        probability: the probability that an image is flipped.
        axis: 2 to flip left to right, 1 to flip upside down.
    """
    both, number = torch.cat([images, images.flip(axis)]), len(images)
    flipped = draws[:, 0] < probability
    return both.index_select(0, torch.arange(number, device=images.device) + number * flipped)


def rotate(images: Tensor, draws: Tensor, degrees: float = 10.0) -> Tensor:
    """Rotates images about their centers by random angles, with bilinear sampling.

    Pixels from outside the original image are black.

    Args:
        images: (N, S, S, C).
        draws: random numbers (N, 1).
        degrees: the largest angle. An angle is uniform between -degrees and degrees, and is counted
            counterclockwise.
    """
    angles = (draws * 2 - 1)[:, :, None] * math.radians(degrees)  # N, 1, 1
    size, cos, sin = images.shape[1], angles.cos(), angles.sin()
    x = (torch.arange(size, device=images.device) * 2 + 1) / size - 1  # S; centers of pixels
    y = x[:, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=3)  # N, S, S, 2
    planes = images.permute(0, 3, 1, 2).float()
    rotated = torch.nn.functional.grid_sample(planes, grid, align_corners=False)
    rotated = rotated if images.is_floating_point() else rotated.round_()
    return rotated.permute(0, 2, 3, 1).to(images.dtype).contiguous()


def color(images: Tensor, draws: Tensor, brightness=0.2, contrast=0.2, saturation=0.2) -> Tensor:
    """Changes the brightness, the contrast and the saturation of images, in this order.

    Each change is torchvision's `adjust_brightness`, `adjust_contrast` or `adjust_saturation` by a
    random factor, the saturation of bytes within one level. The factor is uniform between 1 - x and
    1 + x, but at least 0, where x is the argument. The saturation changes only if there are 3
    channels.

    Args:
        images: (N, S, S, C).
        draws: random numbers (N, 3), one for each change.
        brightness: the largest change of the factor 1 for the brightness.
        contrast: the same for the contrast.
        saturation: the same for the saturation.
    """
    size, channels = images.shape[2:]
    white, levels = (1, 2**16) if images.is_floating_point() else (255, 1)
    weights = (0.2989, 0.587, 0.114) if channels == 3 else [1 / channels] * channels  # ITU-R BT.601
    pixels = images.to(torch.float32, copy=True)
    changes = (brightness, contrast, saturation) if channels == 3 else (brightness, contrast)
    for number, most in enumerate(changes):
        low = max(0.0, 1 - most)
        factor = (low + draws[:, number] * (1 + most - low))[:, None, None, None]
        other = torch.zeros_like(factor)
        if number > 0:
            other = sum(each * weight for each, weight in zip(pixels.split(1, dim=3), weights))
        if number == 1:  # a sum of whole numbers is exact in any order
            other = (other * levels).int().sum((1, 2, 3), keepdim=True) / (levels * size**2)
        pixels.mul_(factor).add_(other * (1 - factor)).clamp_(0, white)
        pixels = pixels if images.is_floating_point() else pixels.floor_()
    return pixels.to(images.dtype)


def erase(images: Tensor, draws: Tensor, probability: float = 0.5, side: float = 0.5) -> Tensor:
    """Makes a random square of some images black.

    The method is cutout (DeVries and Taylor, 2017). The square can reach beyond the image's border.

    Args:
        images: (N, S, S, C).
        draws: random numbers (N, 3). An image is erased if the first number is below `probability`.
            The other numbers are the y and x of the square's center, as fractions of S.
        probability: the probability that an image is erased.
        side: the side of the square as a fraction of S.
    """
    size = images.shape[1]
    pixels = torch.arange(size, device=images.device) + 0.5
    y, x = ((pixels - draws[:, i, None] * size).abs() < side * size / 2 for i in (1, 2))  # N, S
    erased = y[:, :, None] & x[:, None, :] & (draws[:, 0] < probability)[:, None, None]
    return images * ~erased.unsqueeze(3)


# -- functions of single images -----------------------------------------------------------------


def resized_crop(
    image: Tensor, draws: Tensor, size: int, scale: Pair = (0.35, 1.0), ratio: Pair = (0.75, 4 / 3)
) -> Tensor:
    """Crops a random box of an image and resizes the box.

    The box has a random share of the image's area, uniform in `scale`, and a random width by
    height, log-uniform in `ratio`. The default scale is from Wightman et al. (2021). A side that
    would be longer than the image's side becomes as long as the image's side. In this case,
    torchvision's RandomResizedCrop draws again, up to ten times, and at last crops the center. So
    in images that are far from square, boxes are smaller here.

    Args:
        image: (C, H, W).
        draws: random numbers (4), on the CPU: for the area, the width by height, y and x.
        size: height and width of the returned image in pixels.
        scale: the smallest and the largest share of the area.
        ratio: the smallest and the largest width by height.

    Returns:
        The resized box, (C, size, size).
    """
    for_area, for_shape, *for_place = draws.tolist()
    area = (scale[0] + for_area * (scale[1] - scale[0])) * image.shape[1] * image.shape[2]
    shape = ratio[0] * (ratio[1] / ratio[0]) ** for_shape
    parts = [slice(None)]
    for side, wanted, draw in zip(image.shape[1:], (area / shape, area * shape), for_place):
        length = min(side, max(1, round(wanted**0.5)))
        start = int(draw * (side - length + 1))
        parts.append(slice(start, start + length))
    # Bytes are resized twice as fast if the box lies in one piece, channels last.
    box = image[tuple(parts)].permute(1, 2, 0).contiguous()
    return resize(box.permute(2, 0, 1), size, size)


# -- all of them --------------------------------------------------------------------------------

# The function of each augmentation, and how many random numbers an image needs. The functions of
# single images from torchvision draw from torch's global generator instead.
AUGMENTATIONS: dict[str, tuple[Callable[..., Tensor] | str, int]] = {
    "crop": (crop, 2),
    "flip": (flip, 1),
    "vflip": (functools.partial(flip, axis=1), 1),
    "rotate": (rotate, 1),
    "color": (color, 3),
    "resized_crop": (resized_crop, 4),
    "erase": (erase, 3),
    "randaugment": ("torchvision.transforms.v2:RandAugment", 0),  # 2 changes of magnitude 9
    "trivialaugment": ("torchvision.transforms.v2:TrivialAugmentWide", 0),
}


@dataclass(frozen=True)
class _Step:
    """One of the configured augmentations.

    Attributes:
        name: the name of the augmentation.
        words: part of the seed: the CRC-32 of the name, and how often the name was listed before.
        function: the function, with the configured arguments.
        num_draws: how many random numbers an image needs. 0 for a function of single images, which
            draws from global generators.
    """

    name: str
    words: tuple[int, int]
    function: Callable[..., Tensor]
    num_draws: int


class Augmentation:
    """The resizing of the images of a split, and the random augmentation in training.

    The augmentation "resized_crop" comes first and replaces the resizing to the model's image size.
    The others follow in the order of `augment`.

    Args:
        augment: name and settings of each augmentation.
        images: the images of the split.
        size: height and width of the model's images in pixels.
        seed: the seed of the run.

    Raises:
        Refused: a function or class of the user does not exist or does not take its arguments.
    """

    def __init__(self, augment: list[AugmentationConfig], images: Images, size: int, seed: int):
        self._images, self._size, self._seed = images, size, seed
        augment = sorted(augment, key=lambda cfg: cfg.name != "resized_crop")
        names = [cfg.name for cfg in augment]
        self._steps = [build_step(cfg, names[:i].count(cfg.name)) for i, cfg in enumerate(augment)]
        self._is_cropped = "resized_crop" in names
        self._tables: dict[tuple[int, torch.device], list[Tensor]] = {}

    def _draws(self, epoch: int, device: torch.device) -> list[Tensor]:
        """Returns the random numbers for all images of one epoch.

        The numbers depend only on the seed of the run, the epoch and the names of the
        augmentations. The numbers are kept until the numbers of another epoch are needed.

        Args:
            epoch: the epoch, counted from 1.
            device: the device of the returned tables.

        Returns:
            A table per augmentation, float32 (images of the epoch, D). The row number is the last
            number of an image's key: the index of the image, or the position in the epoch.
        """
        if (epoch, device) not in self._tables:
            tables = []
            for step in self._steps:
                words = step.words if step.words[1] else step.words[:1]
                key = seeding.mix(self._seed, seeding.AUGMENT, epoch, *words)
                rng = np.random.Generator(np.random.Philox(key=key))
                table = rng.random((len(self._images), step.num_draws), dtype=np.float32)
                tables.append(torch.from_numpy(table).to(device))
            self._tables = {(epoch, device): tables}
        return self._tables[epoch, device]

    def resize(self, picture: Tensor, key: Key) -> Tensor:
        """Crops a random box of a picture with a margin, and resizes the box.

        Args:
            picture: (C, H, W), uint8 or float in 0..1. If the box is not random, the picture must
                be a square of the model's image size, and is returned unchanged.
            key: (epoch, index of the image), or (epoch, index, position in the epoch). Epoch 0
                means evaluation.

        Returns:
            The image, (C, size, size), as the method `stack` takes it.
        """
        if not self.needs_margin(key[0]):
            return picture
        draws = self._draws(key[0], torch.device("cpu"))[0][key[-1]]
        return self._steps[0].function(picture, draws, self._size)

    def needs_margin(self, epoch: int) -> bool:
        """Returns whether the pictures of an epoch have a margin, for random crops."""
        return self._is_cropped and epoch != EVALUATION

    @property
    def is_slow(self) -> bool:
        """Whether an augmentation works image by image, and so takes long."""
        return any(step.num_draws == 0 for step in self._steps)

    def stack(self, images: list[Tensor], keys: list[Key]) -> Tensor:
        """Stacks images into a batch, and augments the images unless the epoch is 0.

        Args:
            images: N images that the method `resize` returned, (C, size, size).
            keys: the key of each image, as for the method `resize`.

        Returns:
            A batch, (N, C, size, size), channels last in memory.

        Raises:
            DataFailed: a function of the user fails, or images have different dtypes.
        """
        batch = _stacked(images)
        return self._augmented(batch, torch.tensor([key[-1] for key in keys]), keys)

    def gather(self, store: Tensor, rows: Tensor, at: Tensor | slice, keys: list[Key]) -> Tensor:
        """Takes a batch of images from a store, and augments the images unless the epoch is 0.

        Args:
            store: M images, (M, size, size, C). The batch is computed on the device of the store.
            rows: the index of each image in the store, int64 (N).
            at: the last number of each key, N indices.
            keys: the key of each image, as for the method `resize`.

        Returns:
            A batch, (N, C, size, size), channels last in memory.

        Raises:
            DataFailed: a function of the user fails.
        """
        return self._augmented(store.index_select(0, rows), at, keys)

    def _augmented(self, images: Tensor, at: Tensor | slice, keys: list[Key]) -> Tensor:
        """Augments images (N, S, S, C) unless the epoch is 0, and returns (N, C, S, S)."""
        epoch = keys[0][0]
        tables = self._draws(epoch, images.device) if epoch != EVALUATION else []
        for step, table in list(zip(self._steps, tables))[self._is_cropped :]:
            if step.num_draws > 0:
                images = step.function(images, table[at])
            else:
                images = self._one_by_one(step, images, keys)
        return images.permute(0, 3, 1, 2)

    def _one_by_one(self, step: _Step, images: Tensor, keys: list[Key]) -> Tensor:
        # A user's function can draw from any global generator, torchvision draws only from torch's.
        seed = seeding.seed_torch if step.name in AUGMENTATIONS else seeding.seed_sample
        changed = []
        for image, key in zip(images.cpu().permute(0, 3, 1, 2), keys):
            seed(self._seed, seeding.AUGMENT, *key, *step.words)
            try:
                changed.append(fit_image(step.function(image), self._size))
            except Exception as error:
                raise workers.data_failure(error, self._images.name(key[1])) from error
        return _stacked(changed).to(images.device)


def _stacked(images: list[Tensor]) -> Tensor:
    """Stacks images (C, S, S) of one dtype into a batch (N, S, S, C)."""
    if len({image.dtype for image in images}) > 1:  # as floats, bytes would be 255 times as bright
        raise DataFailed("data: expected images of one dtype, got uint8 and float; convert to one")
    return torch.stack([image.permute(1, 2, 0) for image in images])


def build_step(cfg: AugmentationConfig, number_before: int = 0) -> _Step:
    """Builds an augmentation from its settings.

    Args:
        cfg: the name and settings of the augmentation.
        number_before: how many augmentations of the same name come before.

    Raises:
        Refused: a function or class of the user does not exist or does not take its arguments.
    """
    found, num_draws = AUGMENTATIONS.get(cfg.name, (cfg.name, 0))
    found = import_object(found, "data.augment") if isinstance(found, str) else found
    args = cfg.arguments() if cfg.args is None else cfg.args
    try:
        if args:
            inspect.signature(found).bind_partial(**args)
        function = found(**args) if isinstance(found, type) else functools.partial(found, **args)
    except (TypeError, ValueError) as error:
        raise Refused(f"data.augment: {cfg.name}: {error}") from error
    return _Step(cfg.name, (zlib.crc32(cfg.name.encode()), number_before), function, num_draws)
