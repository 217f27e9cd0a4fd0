"""Datasets of the user's files: a CSV file with the paths and labels of images."""

import csv
import os
from pathlib import Path

from cnn.config import DataConfig
from cnn.datasets.findings import Findings
from cnn.datasets.listing import Listing, split_of
from cnn.errors import Refused


def list_table(cfg: DataConfig, findings: Findings, *, needs_train: bool = True) -> Listing:  # noqa: ARG001
    """Lists the images that a CSV file names.

    The columns of the CSV file are path, label and split. A path is relative to the folder of the
    CSV file. A split is train, val or test. If the split is empty or there is no column split, the
    image is for training.

    Args:
        cfg: the section `data` of the settings. `cfg.root` is the CSV file.
        findings: gets the facts that the user has to know, such as columns that are not used.
        needs_train: whether training images are required.

    Returns:
        The images by split.

    Raises:
        Refused: the CSV file or the training images are missing. A path or a label is missing or
            contains a zero byte. Two lines give one image different labels or splits.
    """
    file = Path(cfg.root)
    columns, rows = _read_table(file)
    if not {"path", "label"} <= set(columns):
        got = f"{','.join(columns)[:100]}; save it as UTF-8 with commas"
        raise Refused(f"{file}:1: expected the columns path,label[,split], got {got}")
    listing: Listing = {}
    seen: dict[str, tuple[int, str]] = {}  # path: line, and label and split
    for line, row in rows:
        path, label, split = row["path"], row["label"], split_of(row["split"] or "train")
        if not path or not label or split is None or "\0" in path + label:
            raise Refused(f"{file}:{line}: expected path,label[,train|val|test], got {row}")
        place = f"{label} in {split}"
        earlier, before = seen.setdefault(os.path.normpath(path), (line, place))
        if before != place:
            raise Refused(f"{file}:{line}: {path} is {place}, but line {earlier} says {before}")
        listing.setdefault(split, []).append((file.parent / path, label))
    if "train" not in listing and needs_train:
        raise Refused(f"{file}: no line is for train")
    if not listing:
        raise Refused(f"{file}: no line below the columns")
    return listing


def _read_table(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Reads a CSV file and returns the columns and the rows.

    Args:
        file: the CSV file.

    Returns:
        Two values. The first value is a list of the column names. The second value is a list of
        (line number, values) for each row that is not empty. Values are a dict from column name to
        text. The dict always has the keys "path", "label" and "split". A missing text is "".

    Raises:
        Refused: the file cannot be read or is not in UTF-8.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            columns = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except UnicodeDecodeError as error:
        raise Refused(
            f"data.root: expected a CSV file at {file.resolve()} in UTF-8, but"
            f" {error.object[error.start]:#04x} is no character of it; save it as UTF-8"
        ) from None
    except (OSError, csv.Error) as error:
        raise Refused(f"data.root: expected a CSV file at {file.resolve()}: {error}") from None
    empty = dict.fromkeys(("path", "label", "split"), "")
    return columns, [(line, empty | dict(zip(columns, cells))) for line, cells in rows]
