"""The user's own images: a folder of class folders, or a CSV file of paths and labels."""

import csv
import logging
import os
from pathlib import Path

import numpy as np

from cnn.datasets.image_files import EXTENSIONS, image_files
from cnn.datasets.images import FileImages, Files
from cnn.datasets.scan import scan
from cnn.errors import Refused

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_NAMED = 20  # bad files named in a message

LAYOUT = "ROOT/CLASS/*.jpg, or ROOT/train/CLASS/*.jpg with val/ and test/ beside train/"

Listing = dict[str, list[tuple[Path, str]]]  # split: (file, class) for each


def load_folder(
    root: str, on_bad_image: str, classes: list[str] | None = None
) -> tuple[dict[str, FileImages], list[str]]:
    """Reads ROOT/train|val|test/CLASS/* or ROOT/CLASS/*; the classes are the folders' names.

    Args:
        classes: those of a model that is to be evaluated, in its order. There may then be fewer of
            them, and nothing to train on.

    Raises:
        Refused: no such folder, two for one split, a class without images, files that do not decode.
    """
    top = Path(root)
    if not top.is_dir():
        raise Refused(f"data.root: expected a folder, {LAYOUT}; there is none at {top.resolve()}")
    parts: dict[str, Path] = {}
    for path in _folders(top):
        split = SPLITS.get(path.name.lower())
        if split in parts:
            both = f"{parts[split].name} and {path.name}"
            raise Refused(f"data.root: {top} has two folders for {split}, {both}; keep one of them")
        if split is not None:
            parts[split] = path
    if "train" in parts or (parts and classes is not None):
        unused = [path.name for path in _folders(top) if path not in parts.values()]
        if unused:
            beside = next(iter(parts.values())).name
            logger.warning("%s: beside %s, used for nothing: %s", top, beside, ", ".join(unused))
        listing = {split: _list_classes(path) for split, path in parts.items()}
    elif parts:
        raise Refused(f"data.root: {top} has {' and '.join(parts)}, but no train beside: {LAYOUT}")
    else:
        listing = {"train": _list_classes(top)}
    return _read(top, listing, on_bad_image, classes)


def load_csv(
    root: str, on_bad_image: str, classes: list[str] | None = None
) -> tuple[dict[str, FileImages], list[str]]:
    """Reads a CSV file with a header and the columns path, label and, if there is one, split.

    Paths are relative to the file's folder; split is train, val or test. Spaces around a value are
    no part of it.

    Args:
        classes: as of `load_folder`.

    Raises:
        Refused: no such file, a missing column, a line that says nothing or contradicts an earlier
            one, files that do not decode.
    """
    file = Path(root)
    columns, rows = _read_table(file)
    if not {"path", "label"} <= set(columns):
        raise Refused(
            f"{file}:1: expected the columns path,label[,split], got {','.join(map(str, columns))}"
        )
    listing: Listing = {}
    first: dict[str, tuple[int, str, str]] = {}  # path: line, split and label
    for line, row in rows:
        path, label, split = row["path"], row["label"], SPLITS.get(row["split"].lower() or "train")
        if not path or not label or split is None:
            raise Refused(f"{file}:{line}: expected path,label[,train|val|test], got {row}")
        before, *said = first.setdefault(os.path.normpath(path), (line, split, label))
        if said != [split, label]:
            raise Refused(
                f"{file}:{line}: {path} is {label} in {split}, but line {before} says {said[1]} in"
                f" {said[0]}; an image has one label and is in one split"
            )
        listing.setdefault(split, []).append((file.parent / path, label))
    if "train" not in listing and classes is None:
        raise Refused(f"{file}: no line is for train")
    if not listing:
        raise Refused(f"{file}: no line below the columns")
    return _read(file, listing, on_bad_image, classes)


def _read_table(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file and its lines by number, all without the spaces around them."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            columns = [name.strip() for name in next(reader, [])]
            lines = [
                (reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells
            ]
    except UnicodeDecodeError as error:
        raise Refused(
            f"data.root: expected a CSV file at {file.resolve()} in UTF-8, but {error.object[error.start]:#04x}"
            f" is no character of it; save it as UTF-8"
        ) from None
    except (OSError, csv.Error) as error:
        raise Refused(f"data.root: expected a CSV file at {file.resolve()}: {error}") from None
    empty = dict.fromkeys(("path", "label", "split"), "")
    return columns, [(number, empty | dict(zip(columns, cells))) for number, cells in lines]


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones."""
    inner = (p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    return sorted(inner, key=lambda p: p.name)


def _list_classes(path: Path) -> list[tuple[Path, str]]:
    folders = _folders(path)
    if not folders:
        raise Refused(f"data.root: expected class folders, {LAYOUT}; there are none in {path}")
    items = []
    for folder in folders:
        files = sorted(image_files(folder))
        if not files:
            raise Refused(
                f"data.root: the class folder {folder} has no images ({' '.join(EXTENSIONS)});"
                f" put some there or remove the folder"
            )
        items += [(file, folder.name) for file in files]
    return items


def _read(
    root: Path, listing: Listing, on_bad_image: str, known: list[str] | None
) -> tuple[dict[str, FileImages], list[str]]:
    classes = known or sorted({label for _, label in listing["train"]})
    for split, items in listing.items():
        unknown = sorted({label for _, label in items} - set(classes))
        if unknown and known:
            raise Refused(unknown_classes("data.root", unknown, classes))
        if unknown:
            raise Refused(
                f"data.root: {split} has classes that train has not: {', '.join(unknown[:MAX_NAMED])}"
            )
    if len(classes) < 2:
        raise Refused(f"data.root: expected at least two classes in {root}, got {classes}")
    every = [path for items in listing.values() for path, _ in items]
    rows, bad = scan(root, every)
    if bad:
        _tell_bad(bad, on_bad_image)
    good = np.array([path not in bad for path in every])
    gray = rows["gray"][good].all()
    paths = [path for path in every if path not in bad]
    files = Files(root, paths, rows[good], channels=1 if gray else 3, skip=on_bad_image == "skip")
    numbers = {label: number for number, label in enumerate(classes)}
    labels = np.array([numbers[label] for items in listing.values() for _, label in items])[good]
    of_split = np.repeat(np.arange(len(listing)), [len(items) for items in listing.values()])[good]
    splits = {}
    for number, split in enumerate(listing):
        rows_of_split = np.flatnonzero(of_split == number)
        if not len(rows_of_split):
            raise Refused(f"data.root: no image of {split} decodes")
        splits[split] = FileImages(files, labels[rows_of_split], rows_of_split)
    return splits, classes


def unknown_classes(key: str, unknown: list[str], known: list[str]) -> str:
    """The refusal of data that have classes which a model does not know."""
    shown = [", ".join(names[:MAX_NAMED]) for names in (unknown, known)]
    return (
        f"{key}: expected classes that the model knows, got {shown[0]};"
        f" it knows {shown[1]}{', ...' if len(known) > MAX_NAMED else ''}"
    )


def _tell_bad(bad: dict[Path, str], on_bad_image: str) -> None:
    lines = [f"  {path}: {reason}" for path, reason in list(bad.items())[:MAX_NAMED]]
    if len(bad) > MAX_NAMED:
        lines.append(f"  and {len(bad) - MAX_NAMED} more")
    files = f"{len(bad)} image file{'s do' if len(bad) > 1 else ' does'} not decode"
    if on_bad_image == "stop":
        what = "mend or remove them, or leave them out with data.on_bad_image=skip"
        raise Refused("\n".join([f"data.root: {files}; {what}:", *lines]))
    logger.warning("\n".join([f"{files}, left out:", *lines]))
