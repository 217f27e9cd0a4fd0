"""What an evaluation says, from its confusion matrix and the probabilities: float64, on the host.

Undefined is not 0: where nothing was there to be measured, an array has nan and a single figure is
None. scikit-learn is the oracle of the tests (`zero_division=nan`). Nothing here imports torch.
"""

import math

import numpy as np

Metrics = dict[str, float | None]  # by name; None where one is undefined

TOP_K = 5
MIN_CLASSES_FOR_TOP_K = 4 * TOP_K  # among fewer, chance alone is soon right
ECE_BINS = 15  # as Guo et al. (ICML 2017)
SPLITS = ("train_", "val_", "test_")
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile

TOP_K_ACC = f"top{TOP_K}_acc"

# Every metric, by the way in which it is better; a test holds that none is left out.
HIGHER = ("acc", "balanced_acc", "f1", TOP_K_ACC, "auc", "sensitivity", "specificity")
LOWER = ("loss", "log_loss", "ece")
# Which of them need the probability of every class; the others are made of the matrix.
FROM_PROBABILITIES = ("auc", "log_loss", "ece")
OF_TWO_CLASSES = ("auc", "sensitivity", "specificity")


def epoch_metrics(num_classes: int, monitor: str) -> tuple[str, ...]:
    """The metrics of every epoch's validation: loss, accuracy, and what the classes call for."""
    names = ["loss", "acc", "balanced_acc", "f1"]
    if num_classes >= MIN_CLASSES_FOR_TOP_K:
        names.append(TOP_K_ACC)
    if num_classes == 2:
        names += OF_TWO_CLASSES
    monitored = monitor.removeprefix("val_")
    return (*names, *([] if monitored in names else [monitored]))


def result_metrics(num_classes: int) -> tuple[str, ...]:
    """The metrics of the final test: all there are."""
    names = epoch_metrics(num_classes, "val_auc")
    return (*names, *(name for name in FROM_PROBABILITIES if name not in names))


def mode(metric: str) -> str:
    """Which way a metric is better, min or max, whether train_, val_ or test_ stands before it."""
    name = metric.split("_", 1)[1] if metric.startswith(SPLITS) else metric
    return "min" if name in LOWER else "max"


def improves(metric: str, value: float | None, best: float | None) -> bool:
    """Whether the value is better than the best so far; what is undefined or no number never is."""
    if value is None or not math.isfinite(value):
        return False
    return best is None or (value < best if mode(metric) == "min" else value > best)


def wilson(correct: float, count: int) -> tuple[float, float] | None:
    """The 95 % interval of a share (Wilson, 1927); None of nothing."""
    if count == 0:
        return None
    share, z2 = correct / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(accuracy: float | None, count: int, digits: int = 4) -> str:
    """`0.9833 (95 %: 0.9726 to 0.9899)`; n/a of nothing."""
    if accuracy is None or count == 0:
        return "n/a"
    low, high = wilson(accuracy * count, count)
    return f"{accuracy:.{digits}f} (95 %: {low:.{digits}f} to {high:.{digits}f})"


# -- of a confusion matrix: a row a class as labelled, a column a class as predicted ------------


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 (classes, classes): row as labelled, column as predicted."""
    cells = np.bincount(labels.astype(np.int64) * num_classes + predictions, None, num_classes**2)
    return cells.reshape(num_classes, num_classes)


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall (sensitivity), specificity, F1 and support of each class."""
    matrix = np.asarray(matrix)
    hits, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    others = matrix.sum() - support
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "specificity": _ratio(others - (predicted - hits), others),
        "f1": _ratio(2 * hits, support + predicted),
        "support": support,
    }


def macro(values: np.ndarray) -> float | None:
    """The mean over the classes where there is a value."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def weighted(values: np.ndarray, support: np.ndarray) -> float | None:
    """The mean over the classes where there is a value, each weighing as many images as it has."""
    defined = ~np.isnan(values) & (support > 0)
    if not defined.any():
        return None
    return float((values[defined] * support[defined]).sum() / support[defined].sum())


def from_confusion_matrix(matrix: np.ndarray) -> Metrics:
    """Balanced accuracy, macro F1 and, of two classes, sensitivity and specificity of class 1."""
    classes = per_class(matrix)
    values = {"balanced_acc": macro(classes["recall"]), "f1": macro(classes["f1"])}
    if len(matrix) == 2:
        values["sensitivity"] = macro(classes["recall"][1:])
        values["specificity"] = macro(classes["recall"][:1])
    return values


def most_confused(matrix: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """The pairs of classes that are mixed up most often: as labelled, as predicted, how often."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    cells = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = [divmod(int(cell), len(matrix)) for cell in cells]
    return [(*pair, int(wrong[pair])) for pair in pairs if wrong[pair]]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


# -- of the scores: a row an image, a column a class --------------------------------------------


def auc_per_class(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, from rank sums; ties count half.

    (Mann and Whitney, 1947; Hanley and McNeil, 1982.) nan where a class or the rest is absent.
    """
    areas = np.full(scores.shape[1], np.nan)
    for number, column in enumerate(np.array(scores.T, order="C")):
        own = np.sort(column[labels == number])
        positives, negatives = len(own), len(column) - len(own)
        if positives == 0 or negatives == 0:
            continue
        column.sort()  # the copy
        # Below each positive: all that is less, and half of what equals it.
        ranks = column.searchsorted(own, "left") + column.searchsorted(own, "right")
        below = ranks.sum() / 2 - positives * positives / 2
        areas[number] = below / (positives * negatives)
    return areas


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Of two classes, the area of class 1; of more, the mean over the classes against the rest."""
    if not np.isfinite(scores).all():
        return None
    if scores.shape[1] == 2:
        return macro(auc_per_class(labels, scores)[1:])
    return macro(auc_per_class(labels, scores))


def log_loss(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Mean of -log of the probability given to the label; clipped as scikit-learn does."""
    if len(labels) == 0 or not np.isfinite(scores).all():
        return None
    least = np.finfo(scores.dtype).eps
    given = scores[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.clip(given, least, 1 - least)).mean())


def calibration_error(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017, section 2)."""
    if len(labels) == 0 or not np.isfinite(scores).all():
        return None
    sure = scores.max(1).astype(np.float64)
    right = scores.argmax(1) == labels
    bins = np.clip(np.ceil(sure * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps = np.bincount(bins, sure - right, ECE_BINS)  # in each bin, count * (confidence - accuracy)
    return float(np.abs(gaps).sum() / len(labels))


def from_probabilities(labels: np.ndarray, scores: np.ndarray) -> Metrics:
    """AUC, log-loss and calibration error. labels int (N), scores (N, classes)."""
    return {
        "auc": auc(labels, scores),
        "log_loss": log_loss(labels, scores),
        "ece": calibration_error(labels, scores),
    }
