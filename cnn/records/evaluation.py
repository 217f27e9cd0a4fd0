"""What a run's evaluations say: confusion matrices, intervals, and a prediction per image."""

import numpy as np
import torch

from cnn.metrics import scores
from cnn.metrics.calibration import scaled
from cnn.metrics.intervals import Interval, intervals
from cnn.records.history import csv_text
from cnn.training.run import Run


def confusion(run: Run, split: str) -> np.ndarray:
    """Returns the confusion matrix of an evaluation, an int64 array (classes, classes).

    Args:
        run: the run, whose state has the predictions of the evaluation.
        split: "val" for the validation of the best epoch, or "test" for the final test.
    """
    predictions = run.state.predictions[split]["prediction"].numpy()
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
    images, saved = run.data.splits[split], run.state.predictions.get(split)
    if saved is None or len(saved["prediction"]) != len(images):
        return {}
    probabilities = saved.get("probabilities")
    return intervals(
        images.labels,
        saved["prediction"].numpy(),
        None if probabilities is None else probabilities.numpy(),
        images.group_names,
    )


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
    images, classes, saved = run.data.splits[split], run.data.classes, run.state.predictions[split]
    if len(saved["prediction"]) != len(images):  # the order would differ
        raise ValueError("some images were left out of the evaluation (data.on_bad_image=skip)")
    columns, of_all = ["image", "label", "prediction", "probability"], [[]] * len(images)
    if "probabilities" in saved:
        columns += [f"p_{name}" for name in classes]
        of_all = saved["probabilities"]
        if split == "val":  # those of the test have the temperature already
            of_all = torch.from_numpy(scaled(of_all.numpy(), run.state.temperature or 1.0))
        saved = saved | {"probability": of_all.max(1).values}
        of_all = of_all.tolist()
    cells = images.labels, saved["prediction"].tolist(), saved["probability"].tolist(), of_all
    rows = (
        (
            images.name(number),
            classes[label],
            classes[prediction],
            *(f"{p:.9g}" for p in [one, *all]),
        )
        for number, (label, prediction, one, all) in enumerate(zip(*cells, strict=True))
    )
    return csv_text(columns, rows)
