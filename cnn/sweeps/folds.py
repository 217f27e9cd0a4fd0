"""The result of a cross-validation, which is a sweep over the setting data.fold alone."""

import statistics
from pathlib import Path

import numpy as np

from cnn.errors import Failed
from cnn.metrics.intervals import share
from cnn.metrics.scores import with_interval
from cnn.metrics.threshold import at_threshold, choose_threshold
from cnn.records.history import csv_text
from cnn.records.run_record import RunRecord, numbers_of_groups, of_positive_class, read_run
from cnn.sweeps.settings import FOLD, Sweep
from cnn.utils.files import write_text


def summarize(sweep: Sweep, file: Path, wanted: dict[str, float]) -> list[list[str]]:
    """Writes the predictions of all folds to a file, and returns the table of the figures.

    Args:
        sweep: a finished cross-validation.
        file: the CSV file, which gets a row per image: the columns of predictions_test.csv, then
            the group and the fold. Each image was predicted by a model that was not trained on it.
        wanted: {"sensitivity": X} or {"specificity": X} for a threshold that reaches X on the
            validation images of each fold; {} for none. The file then has the column threshold.

    Returns:
        Rows of texts: the metric, its mean and standard deviation over the folds, and for a share
        of images the share of the images of all folds, with its 95 % interval.

    Raises:
        Refused: the files of a fold cannot be read.
        Failed: a fold is not tested, its predictions are missing, or it can have no threshold.
    """
    tests, rows = [], []
    for number in range(sweep.trials):
        run = read_run(f"logs/{sweep.run_name(number)}")
        predictions = run.predictions()
        if run.status != "finished" or not predictions:
            raise Failed(f"{run.name}: expected a fold that is tested, with its predictions")
        tests.append(run.result["test"])
        more = {FOLD: sweep.combination(number)[FOLD]}
        if wanted:
            more["threshold"] = _choose(run, wanted)
        rows += [row | more for row in predictions]
    write_text(file, csv_text(list(rows[0]), (list(row.values()) for row in rows)))
    pooled, table = _pool(rows), [["", "mean ± sd over folds", "all images"]]
    for name in (name.removeprefix("test_") for name in tests[0] if not name.endswith("_95")):
        values = [test[f"test_{name}"] for test in tests if test.get(f"test_{name}") is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            of = f" ({len(values)} folds)" if len(values) < len(tests) else ""
            cells = [f"{statistics.mean(values):.4f} ± {spread:.4f}{of}", pooled.get(name, "")]
            table.append([name, *cells])
    if wanted:
        thresholds = np.array([row["threshold"] for row in rows])
        found = at_threshold(*of_positive_class(rows), thresholds, numbers_of_groups(rows))
        chosen = " ".join(f"{name} {value:g}" for name, value in wanted.items())
        table.append([f"at each fold's threshold for {chosen} on val", "", ""])
        table += [[name, "", with_interval(*figures)] for name, figures in found.items()]
    return table


def _choose(run: RunRecord, wanted: dict[str, float]) -> float:
    """Returns the threshold that a fold's validation images ask for."""
    columns = of_positive_class(run.predictions("val"))
    if columns is None or not 0 < columns[0].mean() < 1:
        raise Failed(f"{run.name}: for a threshold, expected validation images of two classes")
    return choose_threshold(*columns, **wanted)


def _pool(rows: list[dict[str, str]]) -> dict[str, str]:
    """Returns the shares of the images of all folds, with intervals, as texts by metric."""
    labels, said = (np.array([row[key] for row in rows]) for key in ("label", "prediction"))
    of, columns = {"acc": np.ones(len(rows), bool)}, of_positive_class(rows)
    if columns is not None:
        of |= {"sensitivity": columns[0], "specificity": ~columns[0]}
    hits, groups = labels == said, numbers_of_groups(rows)
    ends = {name: share(hits, counts, groups) for name, counts in of.items()}
    return {k: with_interval(hits[of[k]].mean().item() if e else None, e) for k, e in ends.items()}
