"""history.csv: a row for each epoch, written and read."""

import csv
import io
from pathlib import Path

from cnn.metrics.scores import Metrics
from cnn.utils.files import write_text


def read_history(path: Path) -> list[Metrics]:
    """history.csv as numbers; an empty cell is None, and where there is no file yet, no rows."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) if cell else None for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def write_history(path: Path, history: list[Metrics]) -> None:
    """Writes history.csv as the history says, whole; so a resume leaves no gap and no double.

    What is undefined is an empty cell.
    """
    text = io.StringIO()
    if history:
        # Rows may know different metrics, where a resume changed the one monitored; times come last.
        columns = dict.fromkeys(name for row in history for name in list(row)[:-2])
        columns |= dict.fromkeys(list(history[-1])[-2:])
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_text(path, text.getvalue())
