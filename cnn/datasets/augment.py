"""Random changes to training images, and the fixed way to the size that the model gets.

Every function takes and gives an image tensor (C, H, W), uint8 as a rule. torchvision is imported
only where one of them is used.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch

from cnn.utils.importing import import_object

Transform = Callable[[torch.Tensor], torch.Tensor]


def build_augmentations(names: list[str], image_size: int) -> list[Transform]:
    """The named changes, in their order; each draws from the global generators.

    They see images of the model's size, but for `resized_crop`, which cuts it out of the whole.
    """
    if not names:
        return []
    known: dict[str, Callable[[], Transform]] = {
        "crop": lambda: functools.partial(crop, size=image_size),
        "flip": lambda: flip,
        "erase": lambda: erase,
        **{name: functools.partial(_torchvisions, name, image_size) for name in TORCHVISIONS},
    }
    names = sorted(names, key=lambda name: name != "resized_crop")  # that one first
    made = [known[name]() if name in known else _own(name) for name in names]
    return made if "resized_crop" in names else [functools.partial(fit, size=image_size), *made]


TORCHVISIONS = ("rotate", "color", "resized_crop")


def _torchvisions(name: str, image_size: int) -> Transform:
    from torchvision.transforms import v2

    if name == "rotate":
        return v2.RandomRotation(10, v2.InterpolationMode.BILINEAR)
    if name == "color":
        return v2.ColorJitter(0.2, 0.2, 0.2)
    # The scale of Wightman et al. (2021), gentler than Inception's 0.08.
    return v2.RandomResizedCrop(image_size, (0.35, 1.0), antialias=True)


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
        self._store = store
        self._sides = torch.arange(self.size, device=store.device)
        self._padding = padding_of(self.size) if "crop" in names else 0

    def __call__(self, rows: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Images uint8 (N, C, S, S), channels last.

        Args:
            rows: in the store (N).
            draws: in [0, 1), (N, NUM_DRAWS); None changes nothing.
        """
        if draws is None or not self.names:
            return self._store.index_select(0, rows).permute(0, 3, 1, 2)
        is_flipped = (
            draws[:, 2] < 0.5 if "flip" in self.names else torch.zeros_like(draws[:, 2]).bool()
        )
        offsets = (draws[:, :2] * (2 * self._padding + 1)).long() - self._padding  # N, 2: y, x
        move = self._copy if self._store.device.type == "cpu" else self._gather
        images = move(rows, is_flipped, offsets)
        if "erase" in self.names:
            images *= ~erased(draws[:, 3:], self.size, self.size).unsqueeze(3)
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
