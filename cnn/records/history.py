"""history.csv: one row per epoch, written and read."""

import csv
import io
from pathlib import Path

from cnn.metrics.scores import Metrics
from cnn.utils.files import write_text


def read_history(path: Path) -> list[Metrics]:
    """Reads history.csv as numbers; an empty cell is None, a missing file has no rows."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) if cell else None for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def write_history(path: Path, history: list[Metrics]) -> None:
    """Replaces history.csv by this history, so that a resume leaves no gap and no duplicate.

    Undefined metrics become empty cells. The two columns of times come last.
    """
    text = io.StringIO()
    if history:
        # Rows have different metrics where a resume changed the monitored one.
        columns = dict.fromkeys(name for row in history for name in list(row)[:-2])
        columns |= dict.fromkeys(list(history[-1])[-2:])
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    write_text(path, text.getvalue())
