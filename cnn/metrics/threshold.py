"""The operating point of a model for two classes: a threshold on the positive class."""

import math

import numpy as np

from cnn.metrics.intervals import Interval, share

SMALLEST = 1e-9  # instead of a share of 0, of which there is no logarithm


def choose_threshold(
    labels: np.ndarray,
    scores: np.ndarray,
    sensitivity: float | None = None,
    specificity: float | None = None,
) -> float:
    """Returns the threshold that reaches a sensitivity, or a specificity, on given images.

    Of all such thresholds it is the one with the best of the other. It lies in the middle between
    two scores. It is 0, or 1, if that is what it takes.

    Args:
        labels: 1 for a positive image, 0 for a negative one (N).
        scores: the probability of the positive class (N).
        sensitivity: the share of the positive images that shall reach the threshold.
        specificity: the share of the negative images that shall stay below, instead.
    """
    scores = scores.astype(np.float64)
    if sensitivity is not None:
        positives = np.sort(scores[labels == 1])[::-1]
        above = positives[math.ceil(sensitivity * len(positives) - SMALLEST) - 1]
        below = max(scores[scores < above], default=0.0)
    else:
        negatives = np.sort(scores[labels == 0])
        below = negatives[math.ceil(specificity * len(negatives) - SMALLEST) - 1]
        above = min(scores[scores > below], default=2.0 - below)
    return float(below + above) / 2


def at_threshold(
    labels: np.ndarray,
    scores: np.ndarray,
    threshold: float | np.ndarray,
    groups: np.ndarray | None = None,
    prevalence: float | None = None,
) -> dict[str, tuple[float | None, Interval | None]]:
    """Returns the figures of a threshold, each with its 95 % interval.

    Args:
        labels: 1 for a positive image, 0 for a negative one (N).
        scores: the probability of the positive class (N).
        threshold: the least score of a positive prediction, for all images or for each (N).
        groups: the name or number of the group of each image (N). None if images are independent.
        prevalence: the share of positives for the predictive values. None for that of the images.

    Returns:
        A dict with "sensitivity", "specificity", "ppv" and "npv", the positive and the negative
        predictive value. An undefined figure is None.
    """
    if groups is not None:
        groups = np.unique(groups, return_inverse=True)[1]
    said, true = scores.astype(np.float64) >= threshold, labels == 1
    parts = {"sensitivity": (said, true), "specificity": (~said, ~true)}
    if prevalence is None:
        parts |= {"ppv": (true, said), "npv": (~true, ~said)}
    found = {}
    for name, (hits, of) in parts.items():
        value = float((hits & of).sum() / of.sum()) if of.any() else None
        found[name] = value, share(hits, of, groups)
    if prevalence is not None and true.any() and not true.all():
        hit, reject = found["sensitivity"], found["specificity"]
        found["ppv"] = _predictive(hit, reject, prevalence)
        found["npv"] = _predictive(reject, hit, 1 - prevalence)
    return found


def _predictive(
    hit: tuple[float, Interval], reject: tuple[float, Interval], prevalence: float
) -> tuple[float, Interval]:
    """Returns a predictive value, by Bayes' theorem, with its interval (Zou and Donner, 2008)."""
    value, ends = _log(hit[0]), [_log(end) for end in hit[1]]
    false, others = _log(1 - reject[0]), [_log(1 - end) for end in reject[1][::-1]]
    odds = math.log(prevalence / (1 - prevalence)) + value - false
    low = odds - math.hypot(value - ends[0], others[1] - false)
    high = odds + math.hypot(ends[1] - value, false - others[0])
    middle, low, high = (1 / (1 + math.exp(-number)) for number in (odds, low, high))
    return middle, (low, high)


def _log(share: float) -> float:
    return math.log(max(share, SMALLEST))
