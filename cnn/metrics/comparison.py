"""Whether two models differ on the same images: differences with 95 % intervals, and p-values."""

import math
from collections.abc import Sequence

import numpy as np

from cnn.metrics.intervals import auc_interval, squares
from cnn.metrics.scores import Z_95

LEAST_COUNT = 10  # positives and negatives, or groups of them
Difference = tuple[float, tuple[float, float], float]  # value, ends of the interval, p-value


def compare_hits(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None
) -> Difference:
    """Compares the accuracies of two models.

    The p-value is that of McNemar's exact test (1947). With groups, it is that of Obuchowski
    (1998), which counts a group's difference once.

    Args:
        first, second: whether each image was predicted correctly by a model, bool (N).
        groups: the number of the group of each image, integers from 0 (N), or None.
    """
    each = second.astype(int) - first.astype(int)
    if groups is not None:
        return _of_influence(each.mean(), each / len(each), groups)
    value, ends, _ = _of_influence(each.mean(), (each - each.mean()) / len(each), None)
    wins, losses = int((each > 0).sum()), int((each < 0).sum())
    number, fewer = wins + losses, min(wins, losses)
    term = tail = 1
    for k in range(fewer):  # the binomial coefficients one after another
        term = term * (number - k) // (k + 1)
        tail += term
    return value, ends, min(1.0, 2 * tail / 2**number)


def compare_areas(
    positives: np.ndarray, first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None
) -> Difference | None:
    """Compares the areas under the ROC curve of two models (DeLong et al., 1988).

    With groups, the variance is that of Obuchowski (1997).

    Args:
        positives: whether each image is of the positive class, bool (N).
        first, second: the scores of the images by a model (N).
        groups: the number of the group of each image, integers from 0 (N), or None.

    Returns:
        The difference. None if fewer than 10 images, or groups, are positive or negative: the
        p-value would be too small.
    """
    every = np.arange(len(positives)) if groups is None else groups
    if min(len(np.unique(every[side])) for side in (positives, ~positives)) < LEAST_COUNT:
        return None
    parts = [auc_interval(positives, scores, groups) for scores in (first, second)]
    (before, _, one), (after, _, other) = parts
    return _of_influence(after - before, other - one, groups)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are corrected for the number of comparisons (Holm, 1979)."""
    order, corrected, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _of_influence(value: float, influence: np.ndarray, groups: np.ndarray | None) -> Difference:
    error = math.sqrt(squares(influence, groups))
    p_value = math.erfc(abs(value) / error / math.sqrt(2)) if error else 1.0
    return value, (value - Z_95 * error, value + Z_95 * error), p_value
