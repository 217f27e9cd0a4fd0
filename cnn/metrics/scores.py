"""Metrics from a confusion matrix and from probabilities, computed with NumPy on the CPU.

An undefined metric is not 0: it is nan in an array, and None as a single value. The tests compare
with scikit-learn (`zero_division=nan`). Nothing here imports torch.
"""

import math
from collections.abc import Sequence

import numpy as np

Metrics = dict[str, float | None]  # by name; None where undefined

TOP_K = 5
MIN_CLASSES_FOR_TOP_K = 4 * TOP_K  # with fewer classes, guessing is right too often
ECE_BINS = 15  # as in Guo et al. (ICML 2017)
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile

TOP_K_ACC = f"top{TOP_K}_acc"

# Every metric, by the direction in which it improves; a test verifies that none is missing.
HIGHER = ("acc", "balanced_acc", "f1", TOP_K_ACC, "auc", "sensitivity", "specificity")
LOWER = ("loss", "log_loss", "ece")
# These need the probability of every class; the others follow from the confusion matrix.
FROM_PROBABILITIES = ("auc", "log_loss", "ece")
OF_TWO_CLASSES = ("auc", "sensitivity", "specificity")


def epoch_metrics(num_classes: int, monitor: str) -> tuple[str, ...]:
    """Returns the names of the metrics of the validation after every epoch.

    Args:
        num_classes: the number of classes. Some metrics exist only for two classes. The metric
            "top5_acc" is computed only for 20 or more classes.
        monitor: the metric by which the best epoch is chosen, such as "val_auc". The result always
            contains the name of the monitored metric.

    Returns:
        Names without the prefix "val_", such as "acc".
    """
    names = ["loss", "acc", "balanced_acc", "f1"]
    if num_classes >= MIN_CLASSES_FOR_TOP_K:
        names.append(TOP_K_ACC)
    if num_classes == 2:
        names += OF_TWO_CLASSES
    return tuple(dict.fromkeys([*names, monitor.removeprefix("val_")]))


def result_metrics(num_classes: int) -> tuple[str, ...]:
    """Returns the names of the metrics of the final test, such as "acc".

    The result contains every metric that is suitable for the number of classes.

    Args:
        num_classes: the number of classes.
    """
    return tuple(dict.fromkeys([*epoch_metrics(num_classes, "val_auc"), *FROM_PROBABILITIES]))


def mode(metric: str) -> str:
    """Returns "min" if lower values of a metric are better, else "max".

    Args:
        metric: the name of the metric, such as "loss". The name of a split may precede the name of
            the metric, as in "val_loss".
    """
    return "min" if metric.endswith(LOWER) else "max"


def improves(metric: str, value: float | None, best: float | None) -> bool:
    """Returns whether a value of a metric is better than the best value.

    Args:
        metric: the name of the metric, such as "val_loss". For a loss, a lower value is better.
        value: the new value. None, nan and infinite values are never better.
        best: the best value so far. If None, every finite value is better.
    """
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best if mode(metric) == "min" else value > best)


def is_better(monitor: str, row: Metrics, best: Metrics) -> bool:
    """Returns whether an epoch is better than the best one so far.

    Of epochs with equal values, the one with the lower validation loss is better.

    Args:
        monitor: the metric by which epochs are compared, such as "val_acc".
        row: the metrics of the epoch, by name.
        best: the metrics of the best epoch so far; {} before the first.
    """
    value, of_best = row.get(monitor), best.get(monitor)
    name = "val_loss" if value is not None and value == of_best else monitor
    return improves(name, row.get(name), best.get(name))


def wilson(correct: float, count: float, z: float = Z_95) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval of a proportion (Wilson, 1927).

    Args:
        correct: the number of correct cases.
        count: the number of all cases.
        z: the quantile of the normal distribution, for another interval than that of 95 %.

    Returns:
        The lower and the upper end of the interval, from 0 to 1. None if `count` is 0.
    """
    if count == 0:
        return None
    p, z2 = correct / count, z**2
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def format_metric(value: float | None) -> str:
    """Formats a metric for a table.

    Args:
        value: the metric. None and NaN mean that the metric is undefined.

    Returns:
        "n/a" for an undefined metric. An int is written in full. A float from 0.001 to 1000 has
        four decimals, such as "0.9833", and one from 1000 to a million none. Any other float has
        three significant digits, such as "0.000123".
    """
    if value is None or math.isnan(value):
        return "n/a"
    if isinstance(value, int):
        return str(value)
    if 1e3 <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:.4f}" if value == 0 or 1e-3 < value < 1e3 else f"{value:.3g}"


def with_interval(value: float | None, ends: Sequence[float] | None) -> str:
    """Returns a metric and its 95 % confidence interval as text.

    Args:
        value: the metric. None means that the metric is undefined.
        ends: the lower and the upper end of the interval. None leaves out the interval.

    Returns:
        A text such as "0.9833 (95 %: 0.9726 to 0.9899)", or "n/a" for an undefined metric.
    """
    if value is None:
        return "n/a"
    return f"{value:.4f}" + (f" (95 %: {ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


# -- from a confusion matrix: a row per labelled class, a column per predicted class ------------


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix, an int64 array (classes, classes).

    Each row stands for a label, and each column for a predicted class. Each entry is a number of
    images.

    Args:
        labels: the class index of each image, an array (N).
        predictions: the index of the predicted class of each image, an array (N).
        num_classes: the number of classes.
    """
    cells = np.bincount(labels.astype(np.int64) * num_classes + predictions, None, num_classes**2)
    return cells.reshape(num_classes, num_classes)


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Returns precision, recall, specificity, F1 and support of every class.

    Args:
        matrix: the confusion matrix (classes, classes). Rows are labels, columns are predictions.

    Returns:
        A dict with the keys "precision", "recall", "specificity", "f1" and "support". Each value is
        an array with one number per class. An undefined number is nan. The support of a class is
        the number of images with the label of the class.
    """
    matrix = np.asarray(matrix)
    hits, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    negatives = matrix.sum() - support
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "specificity": _ratio(negatives - (predicted - hits), negatives),
        "f1": _ratio(2 * hits, support + predicted),
        "support": support,
    }


def macro(values: np.ndarray) -> float | None:
    """Returns the mean of a metric over the classes with a defined value.

    Args:
        values: the value of the metric for every class, an array (classes). An undefined value is
            nan.

    Returns:
        The mean. None if no value is defined.
    """
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def weighted(values: np.ndarray, support: np.ndarray) -> float | None:
    """Returns the mean of a metric over the classes, weighted by their images.

    Args:
        values: the value of the metric for every class, an array (classes). A class whose value is
            nan is left out.
        support: the number of images of every class, an array (classes).

    Returns:
        The mean. None if no class has both an image and a defined value.
    """
    defined = ~np.isnan(values) & (support > 0)
    return float(np.average(values[defined], weights=support[defined])) if defined.any() else None


def from_confusion_matrix(matrix: np.ndarray) -> Metrics:
    """Returns the metrics that follow from a confusion matrix.

    Args:
        matrix: the confusion matrix (classes, classes). Rows are labels, columns are predictions.

    Returns:
        A dict with the keys "balanced_acc" and "f1". The value of "f1" is the mean of F1 over the
        classes. For two classes, the dict has the further keys "sensitivity" and "specificity".
        Class 1 is then the positive class. The value of an undefined metric is None.
    """
    classes = per_class(matrix)
    values = {"balanced_acc": macro(classes["recall"]), "f1": macro(classes["f1"])}
    if len(matrix) == 2:
        values["sensitivity"] = macro(classes["recall"][1:])
        values["specificity"] = macro(classes["recall"][:1])
    return values


def most_confused(matrix: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """Returns the most frequent confusions of one class with another class.

    Args:
        matrix: the confusion matrix (classes, classes). Rows are labels, columns are predictions.
        number: the largest number of confusions to return.

    Returns:
        A list of tuples, most frequent confusion first. The tuple (3, 5, 12) means that 12 images
        of class 3 were predicted as class 5.
    """
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    cells = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = [divmod(int(cell), len(matrix)) for cell in cells]
    return [(*pair, int(wrong[pair])) for pair in pairs if wrong[pair]]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


# -- from probabilities: labels int (N), scores (N, classes) ------------------------------------


def auc_per_class(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the area under the ROC curve (AUC) of each class.

    Every image of the class is paired with every image of another class. The AUC is the fraction of
    pairs in which the image of the class has the higher score. A pair with equal scores counts half
    (Mann and Whitney, 1947; Hanley and McNeil, 1982).

    Args:
        labels: the class index of each image, an array (N).
        scores: the score of each class for each image, an array (N, classes). A higher score means
            a likelier class.

    Returns:
        An array (classes). The AUC of a class is nan if the class has no image or all images.
    """
    areas = np.full(scores.shape[1], np.nan)
    for number, column in enumerate(np.array(scores.T, order="C")):  # a copy, to be sorted
        positives = np.sort(column[labels == number])
        num_positives, num_negatives = len(positives), len(column) - len(positives)
        if num_positives == 0 or num_negatives == 0:
            continue
        column.sort()
        # Per positive: the number of lower scores, and half the number of equal ones.
        ranks = column.searchsorted(positives, "left") + column.searchsorted(positives, "right")
        lower = ranks.sum() / 2 - num_positives * num_positives / 2
        areas[number] = lower / (num_positives * num_negatives)
    return areas


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the area under the ROC curve (AUC).

    With two classes, the result is the AUC of class 1. With more classes, the AUC of each class
    against all others is computed. The result is then the mean over the classes. A class that has
    no image or all images is left out of the mean.

    Args:
        labels: the class index of each image, an array (N).
        scores: the score of each class for each image, an array (N, classes). A higher score means
            a likelier class.

    Returns:
        The AUC, from 0 to 1. None if all images have the same label, or if there are no images.
    """
    areas = auc_per_class(labels, scores)
    return macro(areas[1:] if len(areas) == 2 else areas)


def log_loss(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the log loss, the mean of -log(p) over all images.

    Here p is the probability of the true class of an image. As in scikit-learn, p is clipped to
    [eps, 1 - eps]. The value eps is the machine epsilon of the dtype of `scores`.

    Args:
        labels: the index of the true class of each image, an array (N).
        scores: the probability of each class for each image, an array (N, classes).
    """
    least = np.finfo(scores.dtype).eps
    of_labels = scores[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.clip(of_labels, least, 1 - least)).mean())


def calibration_error(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al., ICML 2017, section 2).

    The images are sorted into 15 bins by the probability of the predicted class. The bins have
    equal width. For each bin, |accuracy - mean probability| is computed. The calibration error is
    the mean of the results, weighted by the number of images in each bin.

    Args:
        labels: the index of the true class of each image, an array (N).
        scores: the probability of each class for each image, an array (N, classes).
    """
    confidence = scores.max(1).astype(np.float64)
    is_correct = scores.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps = np.bincount(bins, confidence - is_correct, ECE_BINS)  # count * (confidence - accuracy)
    return float(np.abs(gaps).sum() / len(labels))


def from_probabilities(labels: np.ndarray, scores: np.ndarray) -> Metrics:
    """Returns the metrics that are computed from the probabilities of all classes.

    Args:
        labels: the index of the true class of each image, an array (N).
        scores: the probability of each class for each image, an array (N, classes).

    Returns:
        A dict with the keys "auc", "log_loss" and "ece". The value of "auc" is the area under the
        ROC curve. The value of "ece" is the expected calibration error. All values are None if
        there are no images, or if a probability is nan or infinite. The value of "auc" is None if
        all labels are equal.
    """
    if len(labels) == 0 or not np.isfinite(scores).all():
        return dict.fromkeys(FROM_PROBABILITIES)
    return {
        "auc": auc(labels, scores),
        "log_loss": log_loss(labels, scores),
        "ece": calibration_error(labels, scores),
    }
