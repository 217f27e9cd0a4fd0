"""The order of images in an epoch: batches, shares of several processes, balanced draws, keys."""

import numpy as np

# Epoch and index of an image and, where an image may come twice in an epoch, its position there.
# Everything random about a training image is a function of its key.
Key = tuple[int, int] | tuple[int, int, int]
EVALUATION = 0  # stands for the epoch in keys of images that are not augmented


def split_epoch(number: int, batch_size: int) -> list[int]:
    """Returns the sizes of an epoch's batches; a single last image joins the batch before it.

    BatchNorm cannot train on one value per channel, and no image may be left out.
    """
    sizes = [batch_size] * (number // batch_size)
    rest = number % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def share_of(size: int, rank: int, num_ranks: int) -> tuple[int, int, int]:
    """Returns the share of a batch that one of several processes computes: start, end, count.

    The first `count` images of the share enter gradients and metrics. Where a batch has fewer than
    two images per process, which BatchNorm needs, the processes without a share compute the first
    two images of the batch with a count of 0, so that all processes take the same steps.
    """
    sharers = max(1, min(num_ranks, size // 2))
    if rank >= sharers:
        return 0, min(size, 2), 0
    start, end = size * rank // sharers, size * (rank + 1) // sharers
    return start, end, end - start


def keys_of(epoch: int, order: np.ndarray, balanced: bool, start: int, end: int) -> list[Key]:
    """Returns the keys of the images at positions `start` to `end` of an epoch."""
    indices = order[start:end].tolist()
    if balanced and epoch != EVALUATION:
        return [(epoch, index, position) for position, index in enumerate(indices, start)]
    return [(epoch, index) for index in indices]


def draw_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws as many indices as there are labels, with replacement, all classes equally likely.

    The distribution is that of torch's WeightedRandomSampler with a weight of 1 / (images of the
    class) for each image.
    """
    counts = np.unique(labels, return_counts=True)[1]
    by_class, starts = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
    drawn = rng.integers(len(counts), size=len(labels))
    return by_class[starts[drawn] + rng.integers(counts[drawn])]
