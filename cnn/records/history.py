"""Reading and writing of history.csv, which has one row per epoch, and the text of CSV files."""

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cnn.metrics.scores import Metrics
from cnn.utils.files import write_text


def read_history(path: Path) -> list[Metrics]:
    """Reads a file history.csv, which has one row per epoch.

    Args:
        path: the path of history.csv.

    Returns:
        A dict per row, such as {"epoch": 1.0, "val_acc": 0.9}. The value of an empty cell is None.
        The list is empty if the file does not exist.

    Raises:
        ValueError: a cell is not a number.
    """
    return [
        {name: float(cell) if cell else None for name, cell in row.items()}
        for row in read_rows(path)
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file by column; [] if the file does not exist."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_history(path: Path, history: list[Metrics]) -> None:
    """Writes a file history.csv with one row per epoch. An existing file is replaced.

    Args:
        path: the path of history.csv.
        history: a dict of metrics per epoch. A metric that is None becomes an empty cell. The last
            two entries of each dict must be the speed and the duration of the epoch. The speed and
            the duration become the last two columns.

    Raises:
        OSError: the file cannot be written.
    """
    # Rows have different metrics if a resume has changed the monitored metric.
    names = [name for row in history for name in list(row)[:-2]]
    columns = list(dict.fromkeys([*names, *list(history[-1])[-2:]])) if history else []
    rows = ([row.get(name) for name in columns] for row in history)
    write_text(path, csv_text(columns, rows) if history else "")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns the text of a CSV file.

    Args:
        columns: the names of the columns, which become the first line.
        rows: the cells of each row. None becomes an empty cell.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(itertools.chain([columns], rows))
    return text.getvalue()
