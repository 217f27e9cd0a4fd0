"""Tiny images that a network can learn: each class a fixed pattern under noise. For tests."""

import numpy as np

from cnn.datasets.images import ArrayImages

AT_ONCE = 1_024  # images that are made as floats, of eight times the size


def load(
    num_images: int = 512,
    num_test: int = 128,
    num_classes: int = 4,
    image_size: int = 12,
    channels: int = 1,
    noise: float = 40.0,
    seed: int = 0,
) -> tuple[dict[str, ArrayImages], list[str]]:
    """Makes the images, the same for the same arguments; `noise` is a std in 0..255."""
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(60, 196, (num_classes, channels, image_size, image_size))

    def draw(number: int, name: str) -> ArrayImages:
        labels = np.arange(number) % num_classes
        store = np.empty((number, image_size, image_size, channels), np.uint8)
        pixels = store.transpose(0, 3, 1, 2)  # as they are kept: nothing has to be laid anew
        for start in range(0, number, AT_ONCE):
            part = patterns[labels[start : start + AT_ONCE]]
            part += rng.normal(0, noise, part.shape)
            pixels[start : start + AT_ONCE] = np.clip(part, 0, 255)
        return ArrayImages(pixels, labels, name)

    splits = {"train": draw(num_images, "synthetic"), "test": draw(num_test, "synthetic test")}
    return splits, [f"pattern {number}" for number in range(num_classes)]
