"""What a run has left in logs/, read again; finished, running or broken off. Nothing here imports torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnn import config
from cnn.config import Config
from cnn.errors import Refused
from cnn.metrics.scores import Metrics, mode
from cnn.records.history import read_history
from cnn.utils.run_folder import RunLogs, is_running
from cnn.utils.screen import escape_unprintable


@dataclass(frozen=True)
class RunRecord:
    """What a run has left."""

    name: str
    settings: dict[str, Any]  # flat
    history: list[Metrics]
    result: dict[str, Any]
    status: str  # finished, running, broken off

    @property
    def monitor(self) -> str:
        return self.settings["checkpoint.monitor"]

    def best(self) -> Metrics:
        """The row of the best epoch by the monitored metric; {} before there is one."""
        rows = [row for row in self.history if row.get(self.monitor) is not None]
        choose = min if mode(self.monitor) == "min" else max
        return choose(rows, key=lambda row: row[self.monitor], default={})


# -- reading ------------------------------------------------------------------------------------


def read_run(where: str) -> RunRecord:
    """A run by its folder in logs/, the folder above, or its name.

    Raises:
        Refused: there is no run.
    """
    candidates = [RunLogs(path) for path in (Path(where), Path(where, "logs"), Path("logs", where))]
    logs = next((logs for logs in candidates if logs.config.is_file()), None)
    if logs is None:
        raise Refused(
            f"{where}: no run there: expected a folder with {candidates[0].config.name}, as logs/ or"
            f" NAME"
        )
    try:
        settings = config.flat(config.to_dict(Config()))  # what an older version did not know
        settings |= config.flat(yaml.safe_load(logs.config.read_text(encoding="utf-8")))
        history, result = read_history(logs.history), {}
        if logs.result.is_file():
            result = json.loads(logs.result.read_text(encoding="utf-8"))
        result.get("test")  # else it is no mapping
        for row in history:  # cut off, it lacks some
            row["epoch"] + row["images_per_second"] + row["seconds"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError, yaml.YAMLError) as error:
        raise Refused(f"{where}: cannot be read as a run: {error}") from None
    going_on = "running" if is_running(logs.folder) else "broken off"
    status = "finished" if result.get("test") else going_on
    return RunRecord(escape_unprintable(where.rstrip("/\\")), settings, history, result, status)


def format_setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else config.as_text(value)
