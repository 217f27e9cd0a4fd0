"""Compares runs: their final metrics, the settings that differ, and their curves in one chart.

Commands:

    python compare.py first second                     logs/first and logs/second
    python compare.py logs/a logs/archive/*            folders of logs, wherever they are
    python compare.py first second --output report.html

Runs that cannot be read are named and skipped; the exit status is then 1.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn import cli, config
from cnn.errors import Failed, Refused
from cnn.metrics.comparison import LEAST_COUNT, compare_areas, compare_hits, holm
from cnn.metrics.intervals import share
from cnn.metrics.scores import mode, wilson, with_interval
from cnn.records import figures
from cnn.records.figures import COLOURS, Curve, Panel
from cnn.records.pages import render
from cnn.records.run_record import RunRecord, format_setting, numbers_of_groups, read_run
from cnn.utils.files import make_folder, raising_failed
from cnn.utils.outputs import check_output, write_output
from cnn.utils.progress import format_duration
from cnn.utils.screen import align_columns, write_stdout

PAGE = Path("logs", "compare.html")
TITLE = "Curves of compare.py"  # within the PNG file
# The page and the figure.
COMPARISON = (rb"<!DOCTYPE html>", b"<title>Comparison</title>")
FIGURE = (rb"\x89PNG", TITLE.encode())
OLD_FIGURE = (rb"\x89PNG", b"Matplotlib version")  # of the page by default, in earlier versions
SEED = "seed"
OF_IMAGES = ("data.name", "data.args")  # settings by which equal names may be of other images
CHARTS = {
    "Validation accuracy": "val_acc",
    "Validation loss": "val_loss",
    "Training loss": "train_loss",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the script, and returns the exit status.

    Args:
        argv: the arguments of the command line; None for the arguments of this process.
    """
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> None:
    """Compares runs, writes the comparison to an HTML page, and prints the comparison.

    Args:
        argv: the arguments of the command line.

    Raises:
        Refused: none of the runs can be read.
        Failed: the page cannot be written, or some runs cannot be read. The readable runs are
            compared before Failed is raised.
    """
    parser = cli.Parser("compare.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="name of a run, or folder of its logs")
    add("--output", type=Path, default=PAGE, metavar="FILE", help=f"page (default: {PAGE})")
    args = parser.parse_args(argv)
    page = args.output
    if page.suffix.lower() not in (".html", ".htm"):
        raise Refused(f"--output: expected a name that ends with .html, got {page}")
    runs, refusals = [], []
    for where in args.runs:
        try:
            runs.append(read_run(where))
        except Refused as refusal:
            refusals.append(str(refusal))
    if not runs:
        raise Refused("\n".join(refusals))
    if page == PAGE:
        with raising_failed(page):
            make_folder(page.parent)
    check_output("--output", page, COMPARISON)
    check_output("--output", page.with_suffix(".png"), OLD_FIGURE if page == PAGE else FIGURE)
    write_stdout(write_comparison(runs, page))
    if refusals:
        raise Failed("\n".join(refusals))


# -- the comparison --------------------------------------------------------------------------------


def write_comparison(runs: Sequence[RunRecord], page: Path) -> str:
    """Compares runs, and writes the comparison to an HTML page.

    If matplotlib is installed, curves are drawn in the page and in a PNG file beside the page.

    Args:
        runs: the records of the runs.
        page: the path of the page.

    Returns:
        The comparison as text for the screen.

    Raises:
        Failed: a file cannot be written.
    """
    settings, groups = differing_settings(runs), groups_of(runs)
    names, metric = group_names(groups, settings), compared_metric(runs)
    tables = {
        "Runs": run_table(runs),
        "Settings that differ": settings_table(runs, settings) if settings else [["none"]],
    }
    if len(groups) < len(runs):
        metrics = list(dict.fromkeys([metric, "val_acc", "val_loss"]))
        tables["Groups, mean ± standard deviation"] = group_table(groups, names, metrics)
    if paired := paired_rows(runs):
        tables["Differences on the same test images"] = paired
    values = [values_of(group, metric) for group in groups]
    verdicts = [
        verdict((name, other), (of_name, of_other), metric)
        for (name, of_name), (other, of_other) in itertools.combinations(zip(names, values), 2)
    ]
    paragraphs = ["\n".join([head, "", *align_columns(rows)]) for head, rows in tables.items()]
    if verdicts:
        paragraphs.append("\n".join(verdicts))
    curves, files = [], f"{page} (without curves: pip install matplotlib)"
    if figures.is_available():
        panels, picture = panels_of(groups, names), page.with_suffix(".png")
        curves = figures.panel_svgs(panels)
        write_output(picture, figures.png(figures.draw_panels, panels, mark=TITLE))
        files = f"{page}, {picture}"
    content = {"curves": curves, "verdicts": verdicts, "tables": tables}
    text = render("compare.jinja", title="Comparison", **content)
    write_output(page, text.encode("utf-8", "backslashreplace"))
    return "\n\n".join([*paragraphs, files]) + "\n"


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Returns the settings that do not have the same value in all runs.

    The setting `run`, which is the name of a run, is left out.

    Returns:
        For each dotted key, a list with the value in each run. An example for two runs is
        {"optim.lr": [0.1, 0.01]}.
    """
    values = {key: [run.settings.get(key) for run in runs] for key in runs[0].settings}
    return {
        key: found
        for key, found in values.items()
        if key != "run" and any(value != found[0] for value in found)
    }


def groups_of(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Divides runs into groups with equal settings.

    The seed can differ within a group. Settings that do not change the experiment, such as
    "device", can differ, too. The order of the runs is kept.

    Returns:
        A list of groups. Each group is a list of runs.
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        keys = sorted(run.settings.keys() - config.non_experiment_keys() - {SEED})
        settings = json.dumps([(key, run.settings[key]) for key in keys], default=str)
        groups.setdefault(settings, []).append(run)
    return list(groups.values())


def group_names(groups: list[list[RunRecord]], settings: Iterable[str]) -> list[str]:
    """Returns a name for each group, such as "optim.lr=0.1, train.epochs=5".

    Args:
        groups: the runs of each group. The important settings are the same in all runs of a group.
        settings: the dotted keys for the names. The seed, and settings that do not change the
            experiment, such as "device", are ignored.

    Returns:
        The names in the order of the groups. A name is "all runs" if no key is left.
    """
    keys = [key for key in settings if key not in config.non_experiment_keys() | {SEED}]
    return [
        ", ".join(f"{key}={format_setting(group[0].settings[key])}" for key in keys) or "all runs"
        for group in groups
    ]


def compared_metric(runs: Sequence[RunRecord]) -> str:
    """Returns the name of the metric by which groups of runs are compared.

    The metric is "test_acc" if all runs have been tested. Otherwise, the metric is the one by which
    all runs chose the best epoch. If the runs chose by different metrics, the metric is "val_acc".
    """
    if all(final_metric(run, "test_acc") is not None for run in runs):
        return "test_acc"
    monitors = {run.monitor for run in runs}
    return monitors.pop() if len(monitors) == 1 else "val_acc"


def final_metric(run: RunRecord, name: str) -> float | None:
    """Returns the final value of a metric of a run; None without a value.

    Args:
        run: the record of the run.
        name: the name of the metric. A metric that begins with "test_" has the value of the final
            test. Any other metric has the value of the best epoch.
    """
    metrics = run.result.get("test") or {} if name.startswith("test_") else run.best()
    return metrics.get(name)


def values_of(group: list[RunRecord], metric: str) -> list[float]:
    """Returns a group's final values of a metric, one value per seed.

    Among runs with the same seed, only the last run counts. A run without the metric gives no
    value.

    Args:
        group: the runs of the group.
        metric: the name of the metric, such as "val_acc".
    """
    found = {run.settings[SEED]: final_metric(run, metric) for run in group}
    return [value for value in found.values() if value is not None]


def spread_of(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation of values; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def verdict(names: tuple[str, str], values: tuple[list[float], list[float]], metric: str) -> str:
    """Returns a sentence that compares the means of two groups with their spread.

    The spread is sqrt(s1² + s2²), where s1 and s2 are the standard deviations of the groups. Other
    seeds could reverse a difference below the spread. For a group with fewer than two values, the
    sentence says that the spread or the metric is missing.

    Args:
        names: the names of the two groups.
        values: for each group, a list with the value of the metric for each seed.
        metric: the name of the metric, such as "val_acc".
    """
    both = " and ".join(names)
    if not all(values):
        return f"{both}: no {metric} yet"
    means, spreads = [statistics.fmean(v) for v in values], [spread_of(v) for v in values]
    difference = means[0] - means[1]
    apart = f"{metric} {means[0]:.4f} and {means[1]:.4f}, {abs(difference):.4f} apart"
    if None in spreads:
        return f"{both}: {apart}; a group of one run has no spread: train each with several seeds"
    spread = math.hypot(*spreads)
    if abs(difference) <= spread:
        return f"{both} do not differ by more than their spread: {apart}, spread {spread:.4f}"
    better = names[(difference > 0) == (mode(metric) == "min")]
    return f"{better} is better: {apart}, more than their spread of {spread:.4f}"


# -- tables and curves -----------------------------------------------------------------------------


def run_table(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Returns a table with a row per run.

    The first row has the names of the columns. The columns are the run's name, status, epochs, best
    epoch, metrics, training time and images per second. A 95 % interval follows each accuracy
    and each metric of the test that has one.
    """
    monitors = list(dict.fromkeys(run.monitor for run in runs if run.monitor != "val_acc"))
    tests = [name.replace("val_", "test_") for name in monitors]
    metrics = [*monitors, "val_acc", *tests, "test_acc"]
    rows = [["run", "status", "epochs", "best", *metrics, "time", "images/s"]]
    for run in runs:
        best, speeds = run.best(), [row["images_per_second"] for row in run.history]
        rows.append(
            [
                run.name,
                run.status,
                f"{len(run.history)}/{run.settings['train.epochs']}",
                f"{best['epoch']:.0f}" if best else "n/a",
                *(format_value(final_metric(run, name)) for name in monitors),
                accuracy_of(run, "val"),
                *(
                    with_interval(*(final_metric(run, n + end) for end in ("", "_95")))
                    for n in tests
                ),
                accuracy_of(run, "test"),
                format_duration(sum(row["seconds"] for row in run.history)),
                f"{statistics.median(speeds):.0f}" if speeds else "n/a",
            ]
        )
    return rows


def paired_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Returns a table that compares runs with the first run, on the same test images.

    Args:
        runs: the records of the runs.

    Returns:
        A row per run and metric, after a row with the names of the columns. A row without a p-value
        says why there is none. The list is empty if the first run has no predictions.
    """
    tables = [{row["image"]: row for row in run.predictions()} for run in runs]
    images, found, left_out = list(tables[0]), [], []
    for run, table in zip(runs[1:], tables[1:]) if images else ():
        if not table:
            continue
        pairs = [(tables[0][image], table.get(image, {})) for image in images]
        has_other_data = any(run.settings[key] != runs[0].settings[key] for key in OF_IMAGES)
        has_other_labels = any(one["label"] != other.get("label") for one, other in pairs)
        if has_other_data or has_other_labels or len(table) != len(images):
            left_out.append([run.name, "", "other test images", "", ""])
            continue
        groups = numbers_of_groups([row for row, _ in pairs])
        hits = np.array([[row["prediction"] == row["label"] for row in pair] for pair in pairs])
        found.append((run.name, "acc", compare_hits(*hits.T, groups)))
        columns = [name for name in pairs[0][0] if name.startswith("p_")]
        if len(columns) == 2 and columns[1] in pairs[0][1]:
            positives = np.array(["p_" + row["label"] == columns[1] for row, _ in pairs])
            scores = np.array([[float(row[columns[1]]) for row in pair] for pair in pairs])
            found.append((run.name, "auc", compare_areas(positives, *scores.T, groups)))
    few = f"fewer than {LEAST_COUNT} positives or negatives, or groups of them"
    left_out += [[name, metric, few, "", ""] for name, metric, each in found if each is None]
    found = [each for each in found if each[2] is not None]
    corrected = holm([p_value for *_, (*_, p_value) in found])
    head = [f"against {runs[0].name}", "metric", "difference (95 %)", "p", "p by Holm"]
    rows = [
        [name, metric, f"{value:+.4f} ({ends[0]:+.4f} to {ends[1]:+.4f})", f"{p:.3g}", f"{by:.3g}"]
        for (name, metric, (value, ends, p)), by in zip(found, corrected)
    ]
    return [head, *rows, *left_out] if rows or left_out else []


def accuracy_of(run: RunRecord, split: str) -> str:
    """Formats the accuracy of a run, with a 95 % interval if possible.

    The interval is left out if the number of images is unknown.

    Args:
        run: the record of the run.
        split: "val" or "test".
    """
    value, number = final_metric(run, f"{split}_acc"), run.result.get("images", {}).get(split, 0)
    ends = final_metric(run, f"{split}_acc_95")
    if ends is None and value is not None:  # validation images, or a run of an earlier version
        rows = run.predictions(split)
        groups = numbers_of_groups(rows) if rows else None
        if groups is not None:
            hits = np.array([row["label"] == row["prediction"] for row in rows])
            ends = share(hits, np.ones(len(rows), bool), groups)
        else:
            ends = wilson(value * number, number)
    return with_interval(value, ends)


def format_value(value: float | None) -> str:
    """Formats a number with four decimal places, and None as "n/a"."""
    return "n/a" if value is None else f"{value:.4f}"


def group_table(
    groups: list[list[RunRecord]], names: list[str], metrics: Sequence[str]
) -> list[list[str]]:
    """Returns a table with a row per group.

    The first row has the names of the columns. The columns are the group's name, the number of
    runs, and the mean ± standard deviation of each metric. If some runs lack a metric, the number
    of values follows, as in "(of 2)".

    Args:
        groups: the runs of each group.
        names: the names of the groups, in the same order.
        metrics: the names of the metrics, such as "val_acc".
    """
    rows = [["group", "runs", *metrics]]
    for name, group in zip(names, groups, strict=True):
        cells = []
        for metric in metrics:
            values = values_of(group, metric)
            cell, spread = (
                format_value(statistics.fmean(values) if values else None),
                spread_of(values),
            )
            cell += "" if spread is None else f" ± {spread:.4f}"
            if values and any(final_metric(run, metric) is None for run in group):
                cell += f" (of {len(values)})"
            cells.append(cell)
        rows.append([name, str(len(group)), *cells])
    return rows


def settings_table(runs: Sequence[RunRecord], settings: dict[str, list[Any]]) -> list[list[str]]:
    """Returns a table with a row per setting and a column per run.

    The first row has the names of the runs. The first column has the keys of the settings.

    Args:
        runs: the records of the runs.
        settings: by dotted key, a list with the value in each run. An example for two runs is
            {"optim.lr": [0.1, 0.01]}.
    """
    rows = [[key, *map(format_setting, values)] for key, values in settings.items()]
    return [["setting", *(run.name for run in runs)], *rows]


def panels_of(groups: list[list[RunRecord]], names: list[str]) -> list[Panel]:
    """Returns three charts with a curve for every run.

    The charts show the validation accuracy, the validation loss and the training loss over the
    epochs. If there are several groups, all curves of a group have the same colour. The legend then
    has one entry per group.

    Args:
        groups: the runs of each group.
        names: the names of the groups, in the same order.
    """
    several, panels = len(groups) > 1, []
    for title, column in CHARTS.items():
        curves = []
        for number, (group, name) in enumerate(zip(groups, names, strict=True)):
            for member, run in enumerate(group):
                colour = COLOURS[(number if several else member) % len(COLOURS)]
                label = (name if member == 0 else None) if several else run.name
                epochs = [row["epoch"] for row in run.history]
                values = [row.get(column) for row in run.history]
                curves.append(Curve(label, epochs, values, colour, dashed=number >= len(COLOURS)))
        panels.append(Panel(title, curves))
    return panels


if __name__ == "__main__":
    sys.exit(main())
