"""The result of a cross-validation, which is a sweep over the setting data.fold alone."""

import csv
import statistics
from pathlib import Path

import numpy as np

from cnn.errors import Failed
from cnn.metrics.intervals import share
from cnn.metrics.scores import with_interval
from cnn.records.history import csv_text
from cnn.records.run_record import read_run
from cnn.sweeps.settings import FOLD, Sweep
from cnn.utils.files import write_text
from cnn.utils.run_folder import RunLogs


def summarize(sweep: Sweep, file: Path) -> list[list[str]]:
    """Writes the predictions of all folds to a file, and returns the table of the figures.

    Args:
        sweep: a finished cross-validation.
        file: the CSV file, which gets a row per image: the columns of predictions_test.csv, then
            the group and the fold. Each image was predicted by a model that was not trained on it.

    Returns:
        Rows of texts: the metric, its mean and standard deviation over the folds, and for a share
        of images the share of the images of all folds, with its 95 % interval.

    Raises:
        Failed: files of a fold are missing or cannot be read.
    """
    tests, rows = [], []
    for number in range(sweep.trials):
        logs = RunLogs(Path("logs", sweep.run_name(number)))
        try:
            tests.append(read_run(str(logs.folder)).result["test"])
            groups = {row["image"]: row["group"] for row in _read(logs.division)}
            of_fold = {FOLD: sweep.combination(number)[FOLD]}
            for row in _read(logs.test_predictions):
                rows.append(row | {"group": groups[row["image"]]} | of_fold)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise Failed(f"{logs.folder}: cannot be read as a fold that is done: {error}") from None
    write_text(file, csv_text(list(rows[0]), (list(row.values()) for row in rows)))
    pooled, table = _pool(rows), [["", "mean ± sd over folds", "all images"]]
    for name in (name.removeprefix("test_") for name in tests[0] if not name.endswith("_95")):
        values = [test[f"test_{name}"] for test in tests if test.get(f"test_{name}") is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            of = f" ({len(values)} folds)" if len(values) < len(tests) else ""
            cells = [f"{statistics.mean(values):.4f} ± {spread:.4f}{of}", pooled.get(name, "")]
            table.append([name, *cells])
    return table


def _pool(rows: list[dict[str, str]]) -> dict[str, str]:
    """Returns the shares of the images of all folds, with intervals, as texts by metric."""
    names = [name.removeprefix("p_") for name in rows[0] if name.startswith("p_")]
    labels, said = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
    of = {"acc": np.ones(len(rows), bool)}
    if len(names) == 2:
        of |= {"sensitivity": labels == names[1], "specificity": labels == names[0]}
    groups = None
    if all(row["group"] for row in rows):  # copies have numbers, and other images have none
        groups = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    hits, found = labels == said, {}
    for name, counts in of.items():
        ends = share(hits, counts, groups)
        found[name] = with_interval(hits[counts].mean().item() if ends else None, ends)
    return found


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
