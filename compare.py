"""Sets runs side by side: final figures, the settings that differ, curves over each other.

python compare.py first second            logs/first and logs/second (run=first, run=second)
python compare.py logs/a logs/archive/*   folders of logs, wherever they are

A run that cannot be read is named and the others are compared; the exit status is then 1.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn import cli, config
from cnn.errors import Failed, Refused
from cnn.metrics.scores import mode, with_interval
from cnn.records import figures
from cnn.records.figures import COLOURS, Curve
from cnn.records.pages import render
from cnn.records.run_record import RunRecord, format_setting, read_run
from cnn.utils.files import raising_failed, write_atomically, write_text
from cnn.utils.progress import format_duration
from cnn.utils.screen import align_columns, write_stdout

PAGE = Path("logs", "compare.html")
SEED = "seed"


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv, prefix="")


def prepare(argv: list[str]) -> None:
    """Does all of it, since it needs no torch."""
    parser = cli.parser("compare.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of logs, or a run's name")
    parser.add_argument("--output", type=Path, default=PAGE, help=f"page (default {PAGE})")
    args = parser.parse_args(argv)
    runs, refusals = [], []
    for where in args.runs:
        try:
            runs.append(read_run(where))
        except Refused as refusal:
            refusals.append(str(refusal))
    if not runs:
        raise Refused("\n".join(refusals))
    with raising_failed(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        said = compare(runs, args.output)
    write_stdout(said)
    if refusals:
        raise Failed("\n".join(refusals))


# -- comparing ----------------------------------------------------------------------------------


def figure_of(run: RunRecord, name: str) -> float | None:
    """A final figure: of the test, or of the best epoch's validation."""
    if name.startswith("test_"):
        return (run.result.get("test") or {}).get(name)
    return run.best().get(name)


def times_of(run: RunRecord) -> tuple[float, float | None]:
    """Seconds of all epochs, and images per second, the median epoch's."""
    speeds = [row["images_per_second"] for row in run.history]
    seconds = sum(row["seconds"] for row in run.history)
    return seconds, statistics.median(speeds) if speeds else None


def identity(run: RunRecord) -> str:
    """What makes it the same experiment as another: all settings but seed and place."""
    beside = config.non_experiment_keys() | {SEED}
    kept = {key: value for key, value in run.settings.items() if key not in beside}
    return json.dumps(kept, sort_keys=True, default=str)


def differing(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with every run's value."""
    values = {key: [run.settings.get(key) for run in runs] for key in runs[0].settings}
    return {
        key: found
        for key, found in values.items()
        if key != "run" and any(value != found[0] for value in found)
    }


def groups_of(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of one configuration together, in the order they were named."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(identity(run), []).append(run)
    return list(groups.values())


def names_of(groups: list[list[RunRecord]], keys: Sequence[str]) -> list[str]:
    """What tells each group from the others: its values of the settings that differ."""
    keys = [key for key in keys if key not in config.non_experiment_keys() | {SEED}]
    return [
        ", ".join(f"{key}={format_setting(group[0].settings[key])}" for key in keys) or "all runs"
        for group in groups
    ]


def chosen_figure(runs: Sequence[RunRecord]) -> str:
    """What is compared: the test where all have it, else the metric all looked for, else accuracy."""
    if all(figure_of(run, "test_acc") is not None for run in runs):
        return "test_acc"
    monitors = {run.monitor for run in runs}
    return monitors.pop() if len(monitors) == 1 else "val_acc"


def spread_of(values: Sequence[float]) -> float | None:
    """The standard deviation from run to run; None of a single run."""
    return statistics.stdev(values) if len(values) > 1 else None


def verdict(names: tuple[str, str], values: tuple[list[float], list[float]], figure: str) -> str:
    """Whether two groups differ by more than their spread.

    The spread of two groups is that of the difference between a run of the one and a run of the
    other, sqrt(s1² + s2²): a difference within it is one that another seed may turn round.
    """
    if not all(values):
        return f"{names[0]} and {names[1]}: no {figure} yet"
    means, spreads = [statistics.fmean(v) for v in values], [spread_of(v) for v in values]
    difference = means[0] - means[1]
    better = names[0] if (difference > 0) != (mode(figure) == "min") else names[1]
    said = f"{figure} {means[0]:.4f} and {means[1]:.4f}"
    if None in spreads:
        return (
            f"{names[0]} and {names[1]}: {said}, {abs(difference):.4f} apart; a group of one run has"
            f" no spread, so this says little: train each with several seeds"
        )
    spread = math.hypot(*spreads)
    if abs(difference) > spread:
        return (
            f"{better} is better: {said} differ by {abs(difference):.4f}, more than their spread"
            f" of {spread:.4f}"
        )
    return (
        f"{names[0]} and {names[1]} do not differ by more than their spread: {said},"
        f" {abs(difference):.4f} apart, spread {spread:.4f}"
    )


# -- what is shown -------------------------------------------------------------------------------


def run_table(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A row a run: how it stands, best epoch, figures with intervals, time, images a second."""
    monitors = list(dict.fromkeys(run.monitor for run in runs if run.monitor != "val_acc"))
    head = ["run", "status", "epochs", "best", *monitors, "val_acc", "test_acc", "time", "images/s"]
    rows = [head]
    for run in runs:
        best, (seconds, speed) = run.best(), times_of(run)
        rows.append(
            [
                run.name,
                run.status,
                f"{len(run.history)}/{run.settings['train.epochs']}",
                f"{best['epoch']:.0f}" if best else "n/a",
                *(shown_figure(figure_of(run, name)) for name in monitors),
                *(accuracy_of(run, split) for split in ("val", "test")),
                format_duration(seconds),
                f"{speed:.0f}" if speed else "n/a",
            ]
        )
    return rows


def accuracy_of(run: RunRecord, split: str) -> str:
    value, number = figure_of(run, f"{split}_acc"), run.result.get("images", {}).get(split, 0)
    return with_interval(value, number) if number else shown_figure(value)


def shown_figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def group_table(
    groups: list[list[RunRecord]], names: list[str], compared: Sequence[str]
) -> list[list[str]]:
    """A row a group: how many runs, and mean ± standard deviation of each figure."""
    rows = [["group", "runs", *compared]]
    for name, group in zip(names, groups):
        cells = []
        for figure in compared:
            values = values_of(group, figure)
            spread = spread_of(values)
            mean = f"{statistics.fmean(values):.4f}" if values else "n/a"
            mean += "" if spread is None else f" ± {spread:.4f}"
            lacking = bool(values) and any(figure_of(run, figure) is None for run in group)
            cells.append(f"{mean} (of {len(values)})" if lacking else mean)
        rows.append([name, str(len(group)), *cells])
    return rows


def values_of(group: list[RunRecord], figure: str) -> list[float]:
    """The group's figures, one a seed: the same run twice tells nothing of the spread."""
    found = {run.settings[SEED]: figure_of(run, figure) for run in group}
    return [value for value in found.values() if value is not None]


def settings_table(runs: Sequence[RunRecord], found: dict[str, list[Any]]) -> list[list[str]]:
    rows = [["setting", *(run.name for run in runs)]]
    return rows + [[key, *map(format_setting, values)] for key, values in found.items()]


def panels_of(runs: Sequence[RunRecord], groups: list[list[RunRecord]], names: list[str]):
    """Curves of all runs over each other; the seeds of a group share a colour."""
    several = len(groups) > 1
    panels = []
    for title, column in (
        ("Validation accuracy", "val_acc"),
        ("Validation loss", "val_loss"),
        ("Training loss", "train_loss"),
    ):
        curves = []
        for number, (group, name) in enumerate(zip(groups, names)):
            for member, run in enumerate(group):
                colour = COLOURS[(number if several else member) % len(COLOURS)]
                label = (name if member == 0 else None) if several else run.name
                xs, ys = [r["epoch"] for r in run.history], [r.get(column) for r in run.history]
                curves.append(Curve(label, xs, ys, colour, dashed=number >= len(COLOURS)))
        panels.append((title, curves))
    return panels


def compare(runs: Sequence[RunRecord], output: Path | None) -> str:
    """The comparison as text; with `output`, as an HTML page and a picture too."""
    found, groups = differing(runs), groups_of(runs)
    names, figure = names_of(groups, list(found)), chosen_figure(runs)
    parts = [("Runs", run_table(runs))]
    parts.append(("Settings that differ", settings_table(runs, found) if found else [["none"]]))
    verdicts = []
    if len(groups) < len(runs):
        compared = list(dict.fromkeys([figure, "val_acc", "val_loss"]))
        parts.append(("Groups, mean ± standard deviation", group_table(groups, names, compared)))
    if len(groups) > 1:
        sets = [(name, values_of(group, figure)) for name, group in zip(names, groups)]
        for (one, its), (other, others) in itertools.combinations(sets, 2):
            verdicts.append(verdict((one, other), (its, others), figure))
    text = "\n\n".join("\n".join([head, "", *align_columns(rows)]) for head, rows in parts)
    text += "".join(f"\n\n{line}" if n == 0 else f"\n{line}" for n, line in enumerate(verdicts))
    if output is not None:
        text += "\n\n" + write_page(output, runs, groups, names, parts, verdicts)
    return text + "\n"


def write_page(output: Path, runs, groups, names, parts, verdicts: list[str]) -> str:
    """Writes the page and beside it the picture; says where."""
    said, curves = str(output), []
    if figures.is_available():
        panels = panels_of(runs, groups, names)
        curves = [figures.curves_svg(title, curves) for title, curves in panels]
        picture = figures.curves_png(panels)
        write_atomically(output.with_suffix(".png"), lambda file: file.write(picture))
        said += f", {output.with_suffix('.png')}"
    else:
        said += " (without curves: pip install matplotlib)"
    content = {"curves": curves, "verdicts": verdicts, "parts": parts}
    write_text(output, render("compare.jinja", title="Comparison", **content))
    return said


if __name__ == "__main__":
    sys.exit(main())
