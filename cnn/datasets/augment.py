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
        "erase": v2.RandomErasing,
    }
    made = [known[name]() if name in known else _own(name) for name in names]
    return made if "resized_crop" in names else [functools.partial(fit, size=image_size), *made]


def _own(path: str) -> Transform:
    found = import_object(path, "data.augment")
    return found() if isinstance(found, type) else found


def fit(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes the shorter side to `size` and cuts the middle out; an image of that size stays."""
    height, width = image.shape[-2:]
    if height == width == size:
        return image
    from torchvision.transforms.v2 import functional

    return functional.center_crop(functional.resize(image, [size], antialias=True), [size])
