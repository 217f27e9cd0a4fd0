"""Artificial images for tests, which a network can learn: one pattern per class, with noise."""

import numpy as np

from cnn.datasets.images import ArrayImages


def load(
    num_images: int = 512,
    num_test: int = 128,
    num_classes: int = 4,
    image_size: int = 12,
    channels: int = 1,
    noise: float = 40.0,
    seed: int = 0,
) -> tuple[dict[str, ArrayImages], list[str]]:
    """Returns random images that a network can learn to classify.

    All images of a class are the same pattern, with noise added. The same arguments give the same
    images.

    Args:
        num_images: number of training images.
        num_test: number of test images.
        num_classes: number of classes. With three classes, the labels of successive images are 0,
            1, 2, 0, 1 and so on.
        image_size: height and width in pixels.
        channels: number of channels.
        noise: standard deviation of the noise. Pixel values are between 0 and 255.
        seed: determines patterns and noise.

    Returns:
        Two values. The first value is a dict from "train" and "test" to the images. The second
        value is a list of the class names.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(60, 196, (num_classes, channels, image_size, image_size))

    def draw(number: int, name: str) -> ArrayImages:
        labels = np.arange(number) % num_classes
        pixels = patterns[labels]  # float64, eight times the memory of the images
        pixels += rng.normal(0, noise, pixels.shape)
        return ArrayImages(pixels.clip(0, 255).astype(np.uint8), labels, name)

    splits = {"train": draw(num_images, "synthetic"), "test": draw(num_test, "synthetic test")}
    return splits, [f"pattern {number}" for number in range(num_classes)]
