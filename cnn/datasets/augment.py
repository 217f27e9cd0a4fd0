"""Random changes to training images, and the fixed way to the size that the model gets.

Every function takes and gives an image tensor (C, H, W), uint8 as a rule. torchvision is imported
only where one of them is used.
"""

import functools
from collections.abc import Callable

import torch

from cnn.utils.importing import import_object

Transform = Callable[[torch.Tensor], torch.Tensor]


def build_augmentations(names: list[str], image_size: int) -> list[Transform]:
    """The named changes, in their order; each draws from the global generators.

    They see images of the model's size, but for `resized_crop`, which cuts it out of the whole.
    """
    if not names:
        return []
    from torchvision.transforms import v2

    known: dict[str, Callable[[], Transform]] = {
        # Padding of an eighth: 4 pixels at 32, as He et al. (2016) for CIFAR.
        "crop": lambda: v2.RandomCrop(image_size, padding=max(1, image_size // 8)),
        "flip": v2.RandomHorizontalFlip,
        "rotate": lambda: v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
        "color": lambda: v2.ColorJitter(0.2, 0.2, 0.2),
        # The scale of Wightman et al. (2021), gentler than Inception's 0.08.
        "resized_crop": lambda: v2.RandomResizedCrop(image_size, (0.35, 1.0), antialias=True),
        "erase": lambda: erase,
    }
    names = sorted(names, key=lambda name: name != "resized_crop")  # that one first
    made = [known[name]() if name in known else _own(name) for name in names]
    return made if "resized_crop" in names else [functools.partial(fit, size=image_size), *made]


def _own(path: str) -> Transform:
    found = import_object(path, "data.augment")
    return found() if isinstance(found, type) else found


MAX_RESIZED = 20_000_000  # pixels of an image before its middle is cut out


def fit(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes the shorter side to `size` and cuts the middle out; an image of that size stays."""
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    from torchvision.transforms.v2 import functional

    shorter = min(height, width)
    if size**2 * max(height, width) > MAX_RESIZED * shorter:
        # A line of pixels: made as wide as that, it would fill the memory, to be thrown away.
        image = functional.center_crop(image, [min(height, 16 * shorter), min(width, 16 * shorter)])
    return functional.center_crop(functional.resize(image, [size], antialias=True), [size])


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

BATCH_AUGMENTATIONS = ("crop", "flip", "erase")
NUM_DRAWS = 6  # an image: two for crop, one for flip, three for erase


class BatchAugmentation:
    """Gathers images from a store and crops, flips and erases them on the way, a batch at a time.

    Args:
        store: all images, uint8 (M, S, S, C), on the device.
        names: of BATCH_AUGMENTATIONS; none of them: images come as they are.
    """

    def __init__(self, store: torch.Tensor, names: list[str]):
        self.names = names
        self.size, self.channels = store.shape[1], store.shape[3]
        self._pixels = store.view(-1, self.channels)
        self._sides = torch.arange(self.size, device=store.device)
        self._padding = max(1, self.size // 8) if "crop" in names else 0

    def __call__(self, rows: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images uint8 (N, C, S, S), channels last.

        Args:
            rows: in the store (N).
            draws: in [0, 1), (N, NUM_DRAWS); None changes nothing.
        """
        size, names = self.size, self.names if draws is not None else []
        y = x = self._sides.expand(len(rows), size)  # of the source, for each row and column
        if "flip" in names:
            x = torch.where(draws[:, 2:3] < 0.5, size - 1 - x, x)
        if "crop" in names:
            offsets = (draws[:, :2] * (2 * self._padding + 1)).long() - self._padding
            y, x = y + offsets[:, :1], x + offsets[:, 1:]
        near_y, near_x = y.clamp(0, size - 1), x.clamp(0, size - 1)
        places = (rows[:, None] * size + near_y)[:, :, None] * size + near_x[:, None, :]  # N, S, S
        images = self._pixels.index_select(0, places.view(-1))
        images = images.view(len(rows), size, size, self.channels)
        if "crop" in names:  # black where the source has nothing
            images *= ((y == near_y)[:, :, None] & (x == near_x)[:, None, :]).unsqueeze(3)
        if "erase" in names:
            images *= ~erased(draws[:, 3:], size, size).unsqueeze(3)
        return images.permute(0, 3, 1, 2)
