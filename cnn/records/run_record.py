"""A run as its files in logs/ describe it: finished, running or broken off. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cnn import config
from cnn.config import Config
from cnn.errors import Refused
from cnn.metrics.scores import Metrics, is_better
from cnn.records.history import read_history, read_rows
from cnn.utils.run_folder import RunLogs, is_running, names_of_runs
from cnn.utils.screen import escape_unprintable, list_some


@dataclass(frozen=True)
class RunRecord:
    """The settings and results of a run, read from the run's log folder.

    Attributes:
        name: the name or the folder of the run, as typed by the user.
        settings: the settings by their dotted keys, such as "optim.lr".
        history: a dict of metrics per completed epoch.
        result: the content of result.json. {} if there is no result.json.
        status: "finished", "running" or "broken off".
        folder: the log folder of the run.
    """

    name: str
    settings: dict[str, Any]
    history: list[Metrics]
    result: dict[str, Any]
    status: str
    folder: Path

    @property
    def monitor(self) -> str:
        """The name of the metric that decides the best epoch, such as "val_acc"."""
        return self.settings["checkpoint.monitor"]

    def best(self) -> Metrics:
        """Returns the metrics of the best epoch.

        The best epoch has the best value of the monitored metric and, of several such, the lowest
        validation loss.

        Returns:
            The metrics by name. {} if no epoch has a value of the monitored metric.
        """
        best: Metrics = {}
        for row in self.history:
            best = row if is_better(self.monitor, row, best) else best
        return best

    def predictions(self, split: str = "test") -> list[dict[str, str]]:
        """Returns the rows of predictions_test.csv, with the column group of division.csv.

        Args:
            split: "test", or "val" for predictions_val.csv.

        Returns:
            A dict per image. The list is empty if the run has no predictions of these images.
        """
        logs = RunLogs(self.folder)
        file = logs.test_predictions if split == "test" else logs.val_predictions
        groups = {row["image"]: row["group"] for row in read_rows(logs.division)}
        return [row | {"group": groups.get(row["image"], "")} for row in read_rows(file)]


def numbers_of_groups(rows: list[dict[str, str]]) -> np.ndarray | None:
    """Returns the number of the group of each row (N), from 0 on; None without groups."""
    names = [row["group"] for row in rows]  # copies have one, other images have none
    return np.unique(names, return_inverse=True)[1] if all(names) else None


def of_positive_class(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the labels and the scores of rows of predictions for the positive class.

    Returns:
        Whether each row is of the positive class, bool (N), and the probability of that class (N).
        None unless there are two classes.
    """
    columns = [name for name in rows[0] if name.startswith("p_")] if rows else []
    if len(columns) != 2:
        return None
    scores = np.array([float(row[columns[1]]) for row in rows])
    return np.array(["p_" + row["label"] == columns[1] for row in rows]), scores


def read_run(where: str) -> RunRecord:
    """Reads the settings and results of a run from its files.

    Args:
        where: the name of the run, such as "first", or the log folder of the run, such as
            "logs/first". The log folder of a run without a name is "logs". `where` may also be the
            folder that contains this folder "logs".

    Raises:
        Refused: there is no run, or the files of the run cannot be read.
    """
    candidates = [RunLogs(path) for path in (Path(where), Path(where, "logs"), Path("logs", where))]
    logs = next((logs for logs in candidates if logs.config.is_file()), None)
    if logs is None:
        some = list_some(names_of_runs()) or "none in logs/"
        expected = f"expected a name ({some}), or a folder with config.yaml"
        raise Refused(f"{where}: no run there: {expected}")
    try:
        settings = config.flat(config.to_dict(Config()))  # keys that an older file lacks
        settings |= config.flat(yaml.safe_load(logs.config.read_text(encoding="utf-8")))
        history, result = read_history(logs.history), {}
        if logs.result.is_file():
            result = json.loads(logs.result.read_text(encoding="utf-8"))
        status = "finished" if result.get("test") else "broken off"
        for row in history:  # TypeError or KeyError where a row is cut off
            row["epoch"] + row["images_per_second"] + row["seconds"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, yaml.YAMLError) as error:
        raise Refused(f"{where}: cannot be read as a run: {error}") from None
    if status != "finished" and is_running(logs.folder):
        status = "running"
    name = escape_unprintable(where.rstrip("/\\"))
    return RunRecord(name, settings, history, result, status, logs.folder)


def format_setting(value: Any) -> str:
    """Formats the value of a setting as in a configuration file.

    Args:
        value: the value. A float is rounded to six significant digits.
    """
    return f"{value:g}" if isinstance(value, float) else config.as_text(value)
