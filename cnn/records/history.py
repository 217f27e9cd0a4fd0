"""Reading and writing of history.csv, which has one row per epoch."""

import csv
import io
from pathlib import Path

from cnn.metrics.scores import Metrics
from cnn.utils.files import write_text


def read_history(path: Path) -> list[Metrics]:
    """Reads history.csv, which has one row per epoch.

    Returns:
        A list with a dict per row, such as {"epoch": 1.0, "val_acc": 0.9}. An empty cell becomes
        None. If there is no file, the list is empty.

    Raises:
        ValueError: a cell is not a number.
    """
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) if cell else None for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def write_history(path: Path, history: list[Metrics]) -> None:
    """Replaces history.csv by a file with one row per completed epoch.

    A metric that is None becomes an empty cell.

    Args:
        path: the path of history.csv.
        history: the metrics of each epoch by name. The last two entries of each dict are the speed
            and the duration of the epoch. They become the last two columns.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    if history:
        # Rows have different metrics if a resume has changed the monitored metric.
        columns = dict.fromkeys(name for row in history for name in list(row)[:-2])
        columns |= dict.fromkeys(list(history[-1])[-2:])
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_text(path, text.getvalue())
