"""95 % confidence intervals of metrics, over images or over groups of images.

The images of a group, such as the pictures of a patient, are not independent, so groups count. With
few groups, or few images of a class, an estimate of a variance is itself unsure. The variance is
therefore averaged with an assumed one, as if `PRIOR` further groups had it, and the normal quantile
becomes one of Student's t. The assumed variance is that of groups whose images are all alike.
"""

import math
from collections.abc import Iterable

import numpy as np

from cnn.metrics.scores import Z_95, wilson

Interval = tuple[float, float]
Part = tuple[float, Interval, np.ndarray]  # a class's value, interval, and influence of each image

PRIOR = 2  # groups by which the assumed variance counts
LEAST = 0.6  # of Newcombe's variance; near 1, an area's observed variance is often far too small
FEW_GROUPS = 30  # with fewer, an interval of 95 % can be one of 90 %
HALVINGS = 50  # of an interval, to find its ends


def intervals(
    labels: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Returns the 95 % confidence intervals of metrics.

    The accuracy, sensitivity and specificity have the interval of `share`, and the area under the
    ROC curve that of `auc_interval`. F1 of a class has that of the share of hits among the images
    with the label or the prediction. A mean over the classes has the interval of Zou and Donner
    (2008), with the correlation of the classes.

    Args:
        labels: the index of the true class of each image (N).
        predictions: the index of the predicted class of each image (N).
        probabilities: the probability of each class for each image (N, classes), for the area
            under the ROC curve. None leaves out that metric.
        groups: the name or number of the group of each image (N). None if images are independent.

    Returns:
        The lower and the upper end by the name of the metric, such as "acc". A metric that is not
        defined is left out. The metrics "loss", "log_loss" and "ece" are left out, too.
    """
    if groups is not None:
        groups = np.unique(groups, return_inverse=True)[1]
    hits, classes = labels == predictions, np.unique([labels, predictions])
    recalls = (_share_of(hits, labels == number, groups) for number in np.unique(labels))
    found = {
        "acc": share(hits, np.ones(len(labels), bool), groups),
        "balanced_acc": _of_mean(recalls, groups),
        "f1": _of_mean((_f1(labels, predictions, number, groups) for number in classes), groups),
    }
    if probabilities is not None and np.isfinite(probabilities).all():
        number = probabilities.shape[1]
        counted = range(number) if number > 2 else [1]  # with two classes, the positive one
        areas = (auc_interval(labels == k, probabilities[:, k], groups) for k in counted)
        found["auc"] = _of_mean(filter(None, areas), groups)
        if number == 2:
            found["specificity"] = share(hits, labels == 0, groups)
            found["sensitivity"] = share(hits, labels == 1, groups)
    return {name: interval for name, interval in found.items() if interval is not None}


def share(hits: np.ndarray, of: np.ndarray, groups: np.ndarray | None = None) -> Interval | None:
    """Returns the interval of a share, such as that of the correct images.

    The interval is that of Wilson (1927). With groups, the number of images is divided by the
    design effect, the variance in proportion to that of independent images (Kish, 1965).

    Args:
        hits: whether each image counts as a success, bool (N).
        of: whether each image counts at all, bool (N).
        groups: the number of the group of each image, integers from 0 (N), or None.

    Returns:
        The lower and the upper end. None if no image counts.
    """
    number = int(of.sum())
    if groups is None or number == 0:
        return wilson(int((hits & of).sum()), number)
    successes, sizes = np.bincount(groups, hits & of), np.bincount(groups, of)
    count = int((sizes > 0).sum())
    value, assumed = successes.sum() / number, (sizes**2).sum() / number
    spread = ((successes - value * sizes) ** 2).sum() * count / max(count - 1, 1)
    shrunk = (successes.sum() + 2) / (number + 4)  # as Agresti and Coull (1998), never 0 or 1
    # If hits or misses are in few groups, these say little of how alike a group's images are.
    known = min(count, int((successes > 0).sum()), int((successes < sizes).sum()))
    effect = max(1, _average(spread / (number * shrunk * (1 - shrunk)), assumed, known))
    return wilson(value * number / effect, number / effect, _quantile(count))


def auc_interval(
    positives: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None
) -> Part | None:
    """Returns the area under the ROC curve with its interval.

    The interval is the score interval with the variance of Newcombe (2006, method 5), multiplied by
    a factor of at least `LEAST`. The factor makes the variance that of DeLong et al. (1988) or,
    with groups, of Obuchowski (1997).

    Args:
        positives: whether each image is of the positive class, bool (N).
        scores: the score of each image (N). A higher score means a likelier positive.
        groups: the number of the group of each image, integers from 0 (N), or None.

    Returns:
        The area, its interval, and what each image contributes to the deviation (N). None without
        positives or without negatives.
    """
    sides = np.flatnonzero(positives), np.flatnonzero(~positives)
    if not all(map(len, sides)):
        return None
    groups = np.arange(len(scores)) if groups is None else groups
    influence, values, effective, counts = np.empty(len(scores)), [], [], []
    for side, other in (sides, sides[::-1]):
        ordered, sizes = np.sort(scores[other]), np.bincount(groups[side])
        below = sum(ordered.searchsorted(scores[side], end) for end in ("left", "right"))
        shares = below / (2 * len(other))  # of the other images, those below this one
        values.append(shares.mean())
        effective.append(len(side) ** 2 / (sizes**2).sum())
        counts.append(int((sizes > 0).sum()))
        factor = math.sqrt(counts[-1] / max(counts[-1] - 1, 1)) / len(side)
        influence[side] = factor * (shares - shares.mean())
    value, influence[sides[1]] = values[0], -influence[sides[1]]
    numbers, count = [len(side) for side in sides], min(counts)
    margin = 0.5 / max(numbers)
    inner = min(max(value, margin), 1 - margin)
    usual = _auc_variance(inner, *numbers)
    observed, assumed = squares(influence, groups), _auc_variance(inner, *effective)
    factor = max(LEAST, _average(observed, assumed, count) / usual) * _quantile(count) ** 2
    ends = [_end(value, bound, factor, numbers) for bound in (0.0, 1.0)]
    return value, (ends[0], ends[1]), influence


def _end(value: float, bound: float, factor: float, numbers: list[int]) -> float:
    """Returns the area farthest from a value, towards a bound, that the value does not refute."""
    inside, outside = value, bound
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        if (value - middle) ** 2 > factor * _auc_variance(middle, *numbers):
            outside = middle
        else:
            inside = middle
    return inside


def _auc_variance(area: float, num_positives: float, num_negatives: float) -> float:
    """Returns the variance of an area under the ROC curve (Newcombe, 2006, method 5)."""
    number = (num_positives + num_negatives) / 2 - 1
    spread = 1 + number * ((1 - area) / (2 - area) + area / (1 + area))
    return area * (1 - area) * spread / (num_positives * num_negatives)


def _share_of(hits: np.ndarray, of: np.ndarray, groups: np.ndarray | None) -> Part:
    value = (hits & of).sum() / of.sum()
    return value, share(hits, of, groups), (hits - value) * of / of.sum()


def _f1(
    labels: np.ndarray, predictions: np.ndarray, number: int, groups: np.ndarray | None
) -> Part:
    """Returns F1 of a class: 2 s / (1 + s), where s is the share of the hits among either."""
    is_label, is_predicted = labels == number, predictions == number
    ends = share(is_label & is_predicted, is_label | is_predicted, groups)
    total = is_label.sum() + is_predicted.sum()
    value = 2 * (is_label & is_predicted).sum() / total
    influence = 2.0 * (is_label & is_predicted) - value * is_label - value * is_predicted
    return value, (2 * ends[0] / (1 + ends[0]), 2 * ends[1] / (1 + ends[1])), influence / total


def _of_mean(parts: Iterable[Part], groups: np.ndarray | None) -> Interval | None:
    """Returns the interval of a mean over the classes; None without classes."""
    values, below, above, together, apart = [], 0.0, 0.0, 0.0, 0.0
    for value, (low, high), influence in parts:
        values.append(value)
        below, above = below + (value - low) ** 2, above + (high - value) ** 2
        together, apart = together + influence, apart + squares(influence, groups)
    if not values:
        return None
    mean = np.mean(values).item()
    factor = max(1, squares(together, groups) / apart if apart else 1)
    low, high = (math.sqrt(factor * square) / len(values) for square in (below, above))
    return max(0.0, mean - low), min(1.0, mean + high)


def squares(influence: np.ndarray, groups: np.ndarray | None) -> float:
    """Returns the variance of a metric, by the influence of each image and the groups of images.

    Args:
        influence: what each image contributes to the deviation of the metric (N).
        groups: the number of the group of each image, integers from 0 (N), or None.
    """
    sums = influence if groups is None else np.bincount(groups, influence)
    return float((sums**2).sum())


def _average(observed: float, assumed: float, count: int) -> float:
    return (count * observed + PRIOR * assumed) / (count + PRIOR)


def _quantile(count: int) -> float:
    """Returns the 97.5 % quantile of Student's t (Abramowitz and Stegun, 1964, 26.7.5)."""
    z, freedom = Z_95, count + PRIOR - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
