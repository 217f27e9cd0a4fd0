"""The result of a cross-validation, which is a sweep over the setting data.fold alone."""

import statistics
from pathlib import Path

import numpy as np

from cnn.errors import Failed
from cnn.metrics.intervals import share
from cnn.metrics.scores import with_interval
from cnn.records.history import csv_text
from cnn.records.run_record import numbers_of_groups, read_run
from cnn.sweeps.settings import FOLD, Sweep
from cnn.utils.files import write_text


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
        Refused: the files of a fold cannot be read.
        Failed: a fold is not tested, or its predictions are missing.
    """
    tests, rows = [], []
    for number in range(sweep.trials):
        run = read_run(f"logs/{sweep.run_name(number)}")
        predictions = run.predictions()
        if run.status != "finished" or not predictions:
            raise Failed(f"{run.name}: expected a fold that is tested, with its predictions")
        tests.append(run.result["test"])
        fold = sweep.combination(number)[FOLD]
        rows += [row | {FOLD: fold} for row in predictions]
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
    hits, found, groups = labels == said, {}, numbers_of_groups(rows)
    for name, counts in of.items():
        ends = share(hits, counts, groups)
        found[name] = with_interval(hits[counts].mean().item() if ends else None, ends)
    return found
