"""Comparisons of runs on the same test images, by the files predictions_test.csv."""

from collections.abc import Sequence

import numpy as np

from cnn.metrics.comparison import compare_areas, compare_hits, holm
from cnn.records.run_record import RunRecord, numbers_of_groups

OF_IMAGES = ("data.name", "data.args")  # settings by which equal names may be of other images


def paired_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Returns a table that compares runs with the first run, on the same test images.

    Args:
        runs: the records of the runs. Runs without predictions of the same images are left out.

    Returns:
        A row per run and metric, after a row with the names of the columns. The list is empty if
        there is nothing to compare.
    """
    tables = [{row["image"]: row for row in run.predictions()} for run in runs]
    images, found = list(tables[0]), []
    for run, table in zip(runs[1:], tables[1:]) if images else ():
        pairs = [(tables[0][image], table.get(image, {})) for image in images]
        has_other_data = any(run.settings[key] != runs[0].settings[key] for key in OF_IMAGES)
        has_other_labels = any(one["label"] != other.get("label") for one, other in pairs)
        if has_other_data or has_other_labels or len(table) != len(images):
            continue
        groups = numbers_of_groups([row for row, _ in pairs])
        hits = np.array([[row["prediction"] == row["label"] for row in pair] for pair in pairs])
        found.append((run.name, "acc", compare_hits(*hits.T, groups)))
        columns = [name for name in pairs[0][0] if name.startswith("p_")]
        if len(columns) == 2 and columns[1] in pairs[0][1]:
            positives = np.array(["p_" + row["label"] == columns[1] for row, _ in pairs])
            scores = np.array([[float(row[columns[1]]) for row in pair] for pair in pairs])
            found.append((run.name, "auc", compare_areas(positives, *scores.T, groups)))
    found = [each for each in found if each[2] is not None]
    corrected = holm([p_value for *_, (*_, p_value) in found])
    head = [f"against {runs[0].name}", "metric", "difference (95 %)", "p", "p by Holm"]
    rows = [
        [name, metric, f"{value:+.4f} ({ends[0]:+.4f} to {ends[1]:+.4f})", f"{p:.3g}", f"{by:.3g}"]
        for (name, metric, (value, ends, p)), by in zip(found, corrected)
    ]
    return [head, *rows] if rows else []
