"""Datasets of the user's files: a folder of class folders, or a CSV file of paths and labels."""

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
MAX_NAMED = 20  # files or classes listed in a message

LAYOUT = "ROOT/CLASS/*.jpg, or ROOT/train/CLASS/*.jpg with val/ and test/ beside train/"

Listing = dict[str, list[tuple[Path, str]]]  # by split, (file, class name) for every image
FileSplits = dict[str, FileImages]


def load_folder(
    root: str, on_bad_image: str, model_classes: list[str] | None = None
) -> tuple[FileSplits, list[str]]:
    """Reads a folder of images with one folder per class.

    The images are in ROOT/SPLIT/CLASS/ or, without splits, in ROOT/CLASS/. SPLIT is train, val or
    test. CLASS is the name of a class.

    Args:
        root: path of the folder ROOT.
        on_bad_image: what to do with files that do not decode. "stop" raises Refused. "skip" leaves
            the files out and logs a warning.
        model_classes: the class names of a model to evaluate, in the order of the model's outputs.
            The labels are then indices into `model_classes`, and training images are not required.
            If None, the classes are those of the training images.

    Returns:
        Two values. The first value is a dict from "train", "val" or "test" to images. Without
        splits, all images are under "train". The second value is a list of the class names in the
        order of the labels.

    Raises:
        Refused: the folder or the training images are missing, or a class folder is empty. There
            are fewer than two classes, or files do not decode. A split has two folders, such as val
            and valid. An image has a class that is not in `model_classes`. If
            `model_classes` is None, an image has a class without training images.
    """
    top = Path(root)
    if not top.is_dir():
        raise Refused(f"data.root: expected a folder, {LAYOUT}; there is none at {top.resolve()}")
    folders = _find_splits(top)
    if folders and "train" not in folders and model_classes is None:
        raise Refused(f"data.root: {top} has {' and '.join(folders)}, but no train: {LAYOUT}")
    listing = {split: _list_images(folder) for split, folder in folders.items()}
    return _read(top, listing or {"train": _list_images(top)}, on_bad_image, model_classes)


def load_csv(
    root: str, on_bad_image: str, model_classes: list[str] | None = None
) -> tuple[FileSplits, list[str]]:
    """Reads the images that are listed in a CSV file.

    The columns of the CSV file are path, label and split. A path is relative to the folder of the
    CSV file. A split is train, val or test. If the split is empty or there is no column split, the
    image is for training.

    Args:
        root: path of the CSV file.
        on_bad_image: what to do with image files that do not decode. "stop" raises Refused. "skip"
            leaves the image files out and logs a warning.
        model_classes: the class names of a model to evaluate, in the order of the model's outputs.
            The labels are then indices into `model_classes`, and training images are not required.
            If None, the classes are those of the training images.

    Returns:
        Two values. The first value is a dict from "train", "val" or "test" to images. The second
        value is a list of the class names in the order of the labels.

    Raises:
        Refused: the CSV file or the training images are missing. A path or a label is missing or
            contains a zero byte. Two lines give one image different labels or splits. There are
            fewer than two classes, or files do not decode. An image has a class that is not in
            `model_classes`. If `model_classes` is None, an image has a class without training
            images.
    """
    file = Path(root)
    columns, rows = _read_table(file)
    if not {"path", "label"} <= set(columns):
        got = f"{','.join(columns)[:100]}; save it as UTF-8 with commas"
        raise Refused(f"{file}:1: expected the columns path,label[,split], got {got}")
    listing: Listing = {}
    seen: dict[str, tuple[int, str]] = {}  # path: line, and label and split
    for line, row in rows:
        path, label, split = row["path"], row["label"], SPLITS.get(row["split"].lower() or "train")
        if not path or not label or split is None or "\0" in path + label:
            raise Refused(f"{file}:{line}: expected path,label[,train|val|test], got {row}")
        place = f"{label} in {split}"
        earlier, before = seen.setdefault(os.path.normpath(path), (line, place))
        if before != place:
            raise Refused(f"{file}:{line}: {path} is {place}, but line {earlier} says {before}")
        listing.setdefault(split, []).append((file.parent / path, label))
    if "train" not in listing and model_classes is None:
        raise Refused(f"{file}: no line is for train")
    if not listing:
        raise Refused(f"{file}: no line below the columns")
    return _read(file, listing, on_bad_image, model_classes)


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


def _find_splits(top: Path) -> dict[str, Path]:
    """Finds the folders of the splits inside a dataset's folder.

    The folder of a split has the name train, val, valid, validation or test, in upper or lower
    case. If the dataset has splits, a warning lists other folders, which are not used.

    Args:
        top: the folder of the dataset.

    Returns:
        A dict from "train", "val" or "test" to the folder. A split without a folder is not in the
        dict.

    Raises:
        Refused: two folders belong to the same split, such as val and valid.
    """
    folders, splits = _list_folders(top), {}
    for folder in folders:
        split = SPLITS.get(folder.name.lower())
        if split in splits:
            both = f"{splits[split].name} and {folder.name}"
            raise Refused(f"data.root: {top} has two folders for {split}, {both}; keep one of them")
        if split is not None:
            splits[split] = folder
    unused = [folder.name for folder in folders if folder not in splits.values()]
    if splits and unused:
        one = next(iter(splits.values())).name
        logger.warning("%s: beside %s, used for nothing: %s", top, one, ", ".join(unused))
    return splits


def _list_folders(path: Path) -> list[Path]:
    """Returns the folders directly inside a folder, sorted by name.

    Folders whose names begin with "." or "__" are left out.
    """
    inner = (p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    return sorted(inner, key=lambda p: p.name)


def _list_images(path: Path) -> list[tuple[Path, str]]:
    """Lists the image files in a folder that has one folder per class.

    Args:
        path: the folder that contains the class folders.

    Returns:
        (image file, class name) for every image. The class name is the name of the class folder.

    Raises:
        Refused: there are no class folders, or a class folder has no images.
    """
    folders = _list_folders(path)
    if not folders:
        raise Refused(f"data.root: expected class folders, {LAYOUT}; there are none in {path}")
    items = []
    for folder in folders:
        files = sorted(image_files(folder))
        if not files:
            advice = f"({' '.join(EXTENSIONS)}); put some there or remove the folder"
            raise Refused(f"data.root: the class folder {folder} has no images {advice}")
        items += [(file, folder.name) for file in files]
    return items


def _read(
    root: Path, listing: Listing, on_bad_image: str, model_classes: list[str] | None
) -> tuple[FileSplits, list[str]]:
    """Scans image files and builds the splits of a dataset.

    Args:
        root: the folder or CSV file of the dataset.
        listing: a dict from "train", "val" or "test" to a list of (image file, class name).
        on_bad_image: what to do with files that do not decode. "stop" raises Refused. "skip" leaves
            the files out and logs a warning.
        model_classes: the class names of a model to evaluate, in the order of the model's outputs.
            If None, the classes are those of the training images, sorted by name.

    Returns:
        Two values. The first value is a dict from "train", "val" or "test" to images. The second
        value is a list of the class names in the order of the labels.

    Raises:
        Refused: there are fewer than two classes, or files do not decode. All files of a split are
            left out. An image has a class that is not in `model_classes`. If `model_classes` is
            None, an image has a class without training images.
    """
    classes = model_classes or sorted({label for _, label in listing["train"]})
    _check_classes(root, listing, classes, of_model=model_classes is not None)
    paths = [path for items in listing.values() for path, _ in items]
    scans, bad = scan(root, paths)
    _report_bad(bad, on_bad_image)
    scans = scans[[path not in bad for path in paths]]
    paths = [path for path in paths if path not in bad]
    channels = 1 if scans["gray"].all() else 3
    files = Files(root, paths, scans, channels, skip=on_bad_image == "skip")
    numbers = {name: number for number, name in enumerate(classes)}
    splits, start = {}, 0
    for split, items in listing.items():
        labels = [numbers[label] for path, label in items if path not in bad]
        if not labels:
            raise Refused(f"data.root: no image of {split} decodes")
        splits[split] = FileImages(files, labels, np.arange(start, start + len(labels)))
        start += len(labels)
    return splits, classes


def _check_classes(root: Path, listing: Listing, classes: list[str], *, of_model: bool) -> None:
    for split, items in listing.items():
        unknown = sorted({label for _, label in items} - set(classes))
        if unknown and of_model:
            raise Refused(unknown_classes("data.root", unknown, classes))
        if unknown:
            names = ", ".join(unknown[:MAX_NAMED])
            raise Refused(f"data.root: {split} has classes that train has not: {names}")
    if len(classes) < 2:
        raise Refused(f"data.root: expected at least two classes in {root}, got {classes}")


def unknown_classes(key: str, unknown: list[str], known: list[str]) -> str:
    """Returns an error message about classes that a model does not know.

    Args:
        key: the name of the setting that gives the data, such as "data.root".
        unknown: the class names in the data that the model does not know.
        known: the class names that the model knows.
    """
    got, more = ", ".join(unknown[:MAX_NAMED]), ", ..." if len(known) > MAX_NAMED else ""
    expected = f"classes that the model knows, got {got}; it knows {', '.join(known[:MAX_NAMED])}"
    return f"{key}: expected {expected}{more}"


def _report_bad(bad: dict[Path, str], on_bad_image: str) -> None:
    """Reports the files that do not decode, by an error or a warning.

    If all files decode, nothing happens.

    Args:
        bad: a dict from each file that does not decode to the reason.
        on_bad_image: "stop" to raise an error, "skip" to log a warning that the files are left out.

    Raises:
        Refused: `bad` is not empty, and `on_bad_image` is "stop".
    """
    if not bad:
        return
    lines = [f"  {path}: {reason}" for path, reason in list(bad.items())[:MAX_NAMED]]
    if len(bad) > MAX_NAMED:
        lines.append(f"  and {len(bad) - MAX_NAMED} more")
    files = f"{len(bad)} image file{'s do' if len(bad) > 1 else ' does'} not decode"
    if on_bad_image == "stop":
        advice = "repair or remove them, or leave them out with data.on_bad_image=skip"
        raise Refused("\n".join([f"data.root: {files}; {advice}:", *lines]))
    logger.warning("\n".join([f"{files}, left out:", *lines]))
