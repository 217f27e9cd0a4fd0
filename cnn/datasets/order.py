"""The order of the images in an epoch: batch sizes, shares of processes, balanced draws, keys."""

import numpy as np

# Epoch and index of an image and, where an image may come twice in an epoch, its position there.
# Everything random about a training image is a function of its key.
Key = tuple[int, int] | tuple[int, int, int]
EVALUATION = 0  # stands in place of the epoch in the keys of images that are not augmented


def split_epoch(number: int, batch_size: int) -> list[int]:
    """Returns the number of images in each batch of an epoch.

    The last batch contains the rest of the images. If the rest is a single image, this image joins
    the previous batch, if there is one, since BatchNorm cannot train on a single image.

    Args:
        number: how many images the epoch has.
        batch_size: images per batch.
    """
    sizes = [batch_size] * (number // batch_size)
    rest = number % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def share_of(size: int, rank: int, num_ranks: int) -> tuple[int, int, int]:
    """Returns the part of a batch that one of several processes computes.

    BatchNorm needs at least two images per process. If a batch has too few images for that, the
    last processes get no part of it. They compute the batch's first two images, so that all
    processes take the same steps, but these results do not count.

    Args:
        size: how many images the batch has.
        rank: the rank of the process, from 0 on.
        num_ranks: the number of processes.

    Returns:
        Three values: the position in the batch of the first image to compute; the position after
        the last image to compute; and how many of these images count in gradients and metrics,
        which is all or none.
    """
    sharers = max(1, min(num_ranks, size // 2))
    if rank >= sharers:
        return 0, min(size, 2), 0
    start, end = size * rank // sharers, size * (rank + 1) // sharers
    return start, end, end - start


def keys_of(epoch: int, order: np.ndarray, balanced: bool, start: int, end: int) -> list[Key]:
    """Returns the keys of the images at successive positions of an epoch.

    A key seeds everything random about an image. In training, if `balanced`, it is (epoch, index of
    the image, position); otherwise, it is (epoch, index of the image).

    Args:
        epoch: the epoch; 0 means evaluation.
        order: the index of the image at each position of the epoch.
        balanced: whether an image may occur twice in a training epoch.
        start: the first position.
        end: the position after the last one.

    Returns:
        One key per image.
    """
    indices = order[start:end].tolist()
    if balanced and epoch != EVALUATION:
        return [(epoch, index, position) for position, index in enumerate(indices, start)]
    return [(epoch, index) for index in indices]


def draw_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws image indices at random, so that all classes are equally likely at every draw.

    An image may be drawn several times or never. The probabilities are those of torch's
    WeightedRandomSampler if each image has the weight 1 / (number of images of its class).

    Args:
        labels: the class of each image, int (N).
        rng: the generator to draw from.

    Returns:
        Indices into `labels`, int64 (N).
    """
    counts = np.unique(labels, return_counts=True)[1]
    by_class, starts = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
    drawn = rng.integers(len(counts), size=len(labels))
    return by_class[starts[drawn] + rng.integers(counts[drawn])]
