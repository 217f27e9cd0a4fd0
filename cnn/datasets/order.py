"""The order of the images in an epoch: batch sizes, shares of processes, balanced draws, keys."""

import numpy as np

# Epoch and index of an image and, where an image can come twice in an epoch, its position there.
# Everything random about a training image is a function of its key.
Key = tuple[int, int] | tuple[int, int, int]
EVALUATION = 0  # stands in place of the epoch in the keys of images that are not augmented


def split_epoch(number: int, batch_size: int, *, drop_last: bool = False) -> list[int]:
    """Returns the number of images in each batch of an epoch.

    The last batch contains the rest of the images. If the rest is a single image, the image joins
    the previous batch. Without a previous batch, the image is a batch of its own.

    Args:
        number: how many images the epoch has.
        batch_size: images per batch.
        drop_last: whether the rest is left out.
    """
    # BatchNorm cannot train on a single image.
    sizes = [batch_size] * (number // batch_size)
    rest = 0 if drop_last else number % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def share_of(size: int, rank: int, num_ranks: int) -> tuple[int, int, int]:
    """Returns the part of a batch that one of several processes computes.

    BatchNorm needs at least two images per process. If the batch has too few images, the last
    processes get no part of the batch. A process without a part computes the first two images of
    the batch. All processes thus take the same steps, but the results of a process without a part
    do not count.

    Args:
        size: how many images the batch has.
        rank: the rank of the process, from 0 on.
        num_ranks: the number of processes.

    Returns:
        Three values. The first value is the position in the batch of the first image to compute.
        The second value is the position after the last image to compute. The third value is how
        many of the images to compute count in gradients and metrics. Either all images count or
        none.
    """
    sharers = max(1, min(num_ranks, size // 2))
    if rank >= sharers:
        return 0, min(size, 2), 0
    start, end = size * rank // sharers, size * (rank + 1) // sharers
    return start, end, end - start


def keys_of(epoch: int, order: np.ndarray, balanced: bool, start: int, end: int) -> list[Key]:
    """Returns the keys of the images at successive positions of an epoch.

    A key seeds everything random about an image.

    Args:
        epoch: the epoch. Epoch 0 means evaluation.
        order: the index of the image at each position of the epoch.
        balanced: whether an image can occur twice in a training epoch.
        start: the first position.
        end: the position after the last one.

    Returns:
        One key per image, (epoch, index of the image). In training, if `balanced` is true, a key is
        (epoch, index of the image, position in the epoch).
    """
    indices = order[start:end].tolist()
    if balanced and epoch != EVALUATION:
        return [(epoch, index, position) for position, index in enumerate(indices, start)]
    return [(epoch, index) for index in indices]


def draw_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws image indices at random, with all classes equally likely at every draw.

    An image can be drawn several times or never.

    Args:
        labels: the class of each image, int (N).
        rng: the generator of random numbers.

    Returns:
        Indices into `labels`, int64 (N).
    """
    # The probabilities are those of torch's WeightedRandomSampler if each image has the weight 1 /
    # (number of images of its class).
    counts = np.unique(labels, return_counts=True)[1]
    by_class, starts = np.argsort(labels, kind="stable"), np.cumsum(counts) - counts
    drawn = rng.integers(len(counts), size=len(labels))
    return by_class[starts[drawn] + rng.integers(counts[drawn])]
