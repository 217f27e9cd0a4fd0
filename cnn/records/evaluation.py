"""What a run's evaluations say: confusion matrices, intervals, and a prediction per image."""

import numpy as np

from cnn.metrics import scores
from cnn.metrics.calibration import scaled
from cnn.metrics.intervals import Interval, intervals
from cnn.records.curves import evaluation_panels
from cnn.records.figures import Panel
from cnn.records.history import csv_text
from cnn.training.run import Run


def confusion(run: Run, split: str) -> np.ndarray:
    """Returns the confusion matrix of an evaluation, an int64 array (classes, classes).

    Args:
        run: the run, whose state has the predictions of the evaluation.
        split: "val" for the validation of the best epoch, or "test" for the final test.
    """
    predictions = saved_predictions(run, split)["prediction"]
    return scores.confusion(run.data.splits[split].labels, predictions, len(run.data.classes))


def intervals_of(run: Run, split: str) -> dict[str, Interval]:
    """Returns the 95 % confidence intervals of the metrics of an evaluation.

    Args:
        run: the run.
        split: "val" for the validation of the best epoch, or "test" for the final test.

    Returns:
        The lower and the upper end by metric, such as "acc". The dict is empty if the state has no
        predictions, or if images were left out.
    """
    images, saved = run.data.splits[split], saved_predictions(run, split)
    if not saved:
        return {}
    columns = saved["prediction"], saved.get("probabilities")
    return intervals(images.labels, *columns, images.group_names)


def panels_of(run: Run, split: str) -> list[Panel]:
    """Returns charts of the probabilities of an evaluation; [] where they are not known.

    Args:
        run: the run.
        split: "val" for the validation of the best epoch, or "test" for the final test.
    """
    saved, labels = saved_predictions(run, split), run.data.splits[split].labels
    if "probabilities" not in saved:
        return []
    return evaluation_panels(labels, saved["probabilities"], run.data.classes)


def predictions_table(run: Run, split: str) -> str:
    """Returns the text of predictions_val.csv or predictions_test.csv, with a row per image.

    A row contains the name of the image, the true class, the predicted class with its probability,
    and the probability of every class. They have all digits, and the temperature if it is fixed.

    Args:
        run: the run, whose state has the predictions of the evaluation.
        split: "val" for the validation of the best epoch, or "test" for the final test.

    Raises:
        ValueError: some images could not be read and have no prediction.
    """
    images, classes = run.data.splits[split], run.data.classes
    saved = saved_predictions(run, split)
    if not saved:
        raise ValueError("some images were left out of the evaluation (data.on_bad_image=skip)")
    columns, of_all = ["image", "label", "prediction", "probability"], [[]] * len(images)
    if "probabilities" in saved:
        columns += [f"p_{name}" for name in classes]
        of_all = saved["probabilities"].tolist()
    cells = images.labels, saved["prediction"].tolist(), saved["probability"].tolist(), of_all
    rows = (
        (images.name(number), classes[label], classes[said], *(f"{p:.9g}" for p in [one, *every]))
        for number, (label, said, one, every) in enumerate(zip(*cells, strict=True))
    )
    return csv_text(columns, rows)


def saved_predictions(run: Run, split: str) -> dict[str, np.ndarray]:
    """Returns the predictions of an evaluation, with the temperature of the state if it has one.

    Args:
        run: the run.
        split: "val" for the validation of the best epoch, or "test" for the final test.

    Returns:
        Arrays as EvaluationMetrics.predictions names them. The dict is empty if the state has none,
        or if images were left out, so that the order differs.
    """
    saved = {name: part.numpy() for name, part in run.state.predictions.get(split, {}).items()}
    if not saved or len(saved["prediction"]) != len(run.data.splits[split]):
        return {}
    if split == "val" and "probabilities" in saved:  # those of the test have it already
        saved["probabilities"] = scaled(saved["probabilities"], run.state.temperature or 1.0)
        saved["probability"] = saved["probabilities"].max(1)
    return saved
