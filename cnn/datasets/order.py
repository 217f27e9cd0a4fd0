"""Which image stands where in an epoch: batches, shares of several processes, balanced draws, keys."""

import numpy as np

# Epoch, index of the image; and its place in the epoch, where an image may come twice in it. What is
# random about the image is drawn from all of them.
Key = tuple[int, int] | tuple[int, int, int]
EVALUATION = 0  # stands for the epoch where images come as they are


def split_epoch(number: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches; a last image alone joins the batch before it.

    BatchNorm cannot train on one value a channel, and no image is to be left out.
    """
    sizes = [batch_size] * (number // batch_size)
    rest = number % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def share_of(number: int, rank: int, num_ranks: int) -> tuple[int, int, int]:
    """What one of several processes computes of a batch: from, to, and how many of them count.

    BatchNorm cannot train on one value a channel. Where there are not two images for everybody, those
    who get none compute the first two of the batch with the others, and these do not count.
    """
    sharers = max(1, min(num_ranks, number // 2))
    if rank >= sharers:
        return 0, min(number, 2), 0
    start, end = number * rank // sharers, number * (rank + 1) // sharers
    return start, end, end - start


def keys_of(epoch: int, order: np.ndarray, balanced: bool, start: int, end: int) -> list[Key]:
    """The images from one place of the epoch to another."""
    indices = order[start:end].tolist()
    if balanced and epoch != EVALUATION:
        return [(epoch, index, place) for place, index in enumerate(indices, start)]
    return [(epoch, index) for index in indices]


def draw_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many images as there are, with replacement, every class that has some equally likely.

    The distribution of torch's WeightedRandomSampler with weights of 1 over the class's images.
    """
    counts = np.unique(labels, return_counts=True)[1]
    by_class, starts = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
    drawn = rng.integers(len(counts), size=len(labels))
    return by_class[starts[drawn] + rng.integers(counts[drawn])]
