"""The order of the images in an epoch: batch sizes, shares of processes, balanced draws, keys."""

import numpy as np

# Epoch and index of an image and, where an image may come twice in an epoch, its position there.
# Everything random about a training image is a function of its key.
Key = tuple[int, int] | tuple[int, int, int]
EVALUATION = 0  # stands in place of the epoch in the keys of images that are not augmented


def split_epoch(number: int, batch_size: int) -> list[int]:
    """Returns the number of images in each batch of an epoch.

    The last batch may be smaller. A single last image joins the batch before it instead, since
    BatchNorm cannot train on one value per channel, and no image may be left out.

    Args:
        number: count of images in the epoch.
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
    """Returns the share of a batch that one of several processes computes.

    Where a batch has fewer than two images per process, which BatchNorm needs, some processes get
    no share. They compute the first two images of the batch with a count of 0, so that all
    processes take the same steps.

    Args:
        size: count of images in the batch.
        rank: the rank of the process.
        num_ranks: the number of processes.

    Returns:
        The position in the batch of the first image of the share, the position after the last one,
        and the count of images, from the first on, that enter gradients and metrics.
    """
    sharers = max(1, min(num_ranks, size // 2))
    if rank >= sharers:
        return 0, min(size, 2), 0
    start, end = size * rank // sharers, size * (rank + 1) // sharers
    return start, end, end - start


def keys_of(epoch: int, order: np.ndarray, balanced: bool, start: int, end: int) -> list[Key]:
    """Returns the keys of the images at some positions of an epoch.

    Args:
        epoch: the epoch; 0 means evaluation.
        order: the index of the image at each position of the epoch.
        balanced: whether an image may occur twice in a training epoch.
        start: the first position.
        end: the position after the last one.

    Returns:
        (epoch, index) per image, or (epoch, index, position) if it may occur twice.
    """
    indices = order[start:end].tolist()
    if balanced and epoch != EVALUATION:
        return [(epoch, index, position) for position, index in enumerate(indices, start)]
    return [(epoch, index) for index in indices]


def draw_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws as many image indices as there are labels, with replacement and from balanced classes.

    At every draw all classes are equally likely. The distribution is that of torch's
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
