"""ROC and precision-recall curves and a reliability diagram of an evaluation."""

import numpy as np

from cnn.metrics import scores
from cnn.records.figures import COLOURS, Curve, Panel
from cnn.utils.screen import shorten_name

MAX_CURVES = 5  # classes with a curve, those with the smallest area under the ROC curve
GRID = np.linspace(0, 1, 201)  # of the mean over the classes
MAX_POINTS = 400  # of a curve
GREY = "#8a8a8a"


def evaluation_panels(
    labels: np.ndarray, probabilities: np.ndarray, classes: list[str]
) -> list[Panel]:
    """Returns charts of the probabilities of an evaluation.

    With two classes, the curves are those of the positive class, and a vertical line shows the
    threshold 0.5. With more, the curves are those of the worst classes, each against all others,
    and of the mean over all classes.

    Args:
        labels: the index of the true class of each image (N).
        probabilities: the probability of each class for each image (N, classes).
        classes: the names of the classes.
    """
    areas = scores.auc_per_class(labels, probabilities)
    known = np.flatnonzero(~np.isnan(areas))
    if len(classes) == 2:
        known = known[known == 1]
    roc, recalls, sums = [], [], []
    for number in sorted(known, key=lambda number: areas[number]):
        false, hits, precision = _points(labels == number, probabilities[:, number])
        sums.append((np.interp(GRID, false, hits), np.interp(GRID, hits[1:], precision[1:])))
        if len(roc) < MAX_CURVES:
            colour = COLOURS[len(roc)]
            name = shorten_name(classes[number])
            roc.append(Curve(f"{name} {areas[number]:.3f}", false, hits, colour))
            recalls.append(Curve(name, hits[1:], precision[1:], colour))
    if len(sums) > 1:
        for curves, columns in zip((roc, recalls), zip(*sums)):
            curves.append(Curve("mean", GRID, np.mean(columns, 0), GREY, dashed=True))
    marks: list[list[float]] = [[], []]
    if len(classes) == 2 and len(known):
        said = probabilities[:, 1] >= 0.5
        marks = [[said[labels == label].mean()] for label in (0, 1)]
    return [
        Panel("ROC", roc, marks[0], "threshold 0.5", "1 - specificity", "share"),
        Panel("Precision and recall", recalls, marks[1], "threshold 0.5", "recall", "share"),
        _reliability(labels, probabilities),
    ]


def _points(positives: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns 1 - specificity, sensitivity and precision at some thresholds, from (0, 0, 1) on."""
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=np.nan))  # where the value changes
    hits, said = np.cumsum(positives[order])[ends], ends + 1
    columns = (said - hits) / (~positives).sum(), hits / positives.sum(), hits / said
    some = np.unique(np.linspace(0, len(ends) - 1, MAX_POINTS).astype(int))
    return tuple(np.concatenate([[at], column[some]]) for at, column in zip((0, 0, 1), columns))


def _reliability(labels: np.ndarray, probabilities: np.ndarray) -> Panel:
    """Returns the accuracy by the probability of the predicted class, in the bins of the ECE."""
    confidence, is_correct = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.ceil(confidence * scores.ECE_BINS).astype(int)
    used = np.unique(bins)
    means = [[part[bins == number].mean() for number in used] for part in (confidence, is_correct)]
    ideal = Curve("as it should be", [0, 1], [0, 1], GREY, dashed=True)
    xlabel = "probability of the predicted class"
    return Panel(
        "Accuracy by probability", [Curve("model", *means), ideal], xlabel=xlabel, xscale="share"
    )
