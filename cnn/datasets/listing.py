"""The step from listed image files with their class names to the images of each split."""

import itertools
import logging
from pathlib import Path

import numpy as np

from cnn.config import DataConfig
from cnn.config.values import suggest
from cnn.datasets.copies import check_copies
from cnn.datasets.findings import Findings, listed
from cnn.datasets.images import FileImages, Files
from cnn.datasets.scan import scan
from cnn.errors import Refused

MAX_NAMED = 20  # classes listed in a message

Listing = dict[str, list[tuple[Path, str]]]  # by split, (file, class name) for every image
FileSplits = dict[str, FileImages]


def read_listing(
    listing: Listing, cfg: DataConfig, findings: Findings, model_classes: list[str] | None = None
) -> tuple[FileSplits, list[str]]:
    """Scans image files and builds the splits of a dataset.

    Args:
        listing: a dict from "train", "val" or "test" to a list of (image file, class name).
        cfg: the section `data` of the settings.
        findings: gets the facts that the user has to know, such as files that do not decode.
        model_classes: the class names of a model to evaluate, in the order of the model's outputs.
            The labels are then indices into `model_classes`, and training images are not required.
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
    _check_classes(cfg.root, listing, classes, of_model=model_classes is not None)
    items = [(path, label, split) for split, part in listing.items() for path, label in part]
    scans, bad = scan(Path(cfg.root), [path for path, *_ in items], verify=cfg.verify)
    if bad:
        _report_bad(bad, cfg.on_bad_image, findings)
        scans = scans[[path not in bad for path, *_ in items]]
        items = [item for item in items if item[0] not in bad]
    if cfg.on_duplicate != "ignore":
        stays = check_copies(scans["pixels"], items, cfg.on_duplicate, findings)
        scans, items = scans[stays], list(itertools.compress(items, stays))
    channels, paths = 1 if scans["gray"].all() else 3, [path for path, *_ in items]
    files = Files(Path(cfg.root), paths, scans, channels, skip=cfg.on_bad_image == "skip")
    labels = np.array([classes.index(label) for _, label, _ in items])
    splits = {}
    for split in listing:
        rows = np.flatnonzero([item[2] == split for item in items])
        if not len(rows):
            raise Refused(f"data.root: no image of {split} is left")
        splits[split] = FileImages(files, labels[rows], rows)
    return splits, classes


def _check_classes(root: str, listing: Listing, classes: list[str], *, of_model: bool) -> None:
    for split, items in listing.items():
        unknown = sorted({label for _, label in items} - set(classes))
        if unknown and of_model:
            raise Refused(unknown_classes("data.root", unknown, classes))
        if unknown:
            names = _suggest_known(unknown, classes)
            raise Refused(f"data.root: {split} has classes that train has not: {names}")
    if len(classes) < 2:
        raise Refused(f"data.root: expected at least two classes in {root}, got {classes}")


def _suggest_known(unknown: list[str], known: list[str]) -> str:
    return ", ".join(name + suggest(name, known) for name in unknown[:MAX_NAMED])


def unknown_classes(key: str, unknown: list[str], known: list[str]) -> str:
    """Returns an error message about classes that a model does not know.

    Args:
        key: the name of the setting that gives the data, such as "data.root".
        unknown: the class names in the data that the model does not know.
        known: the class names that the model knows.
    """
    got, more = _suggest_known(unknown, known), ", ..." if len(known) > MAX_NAMED else ""
    expected = f"classes that the model knows, got {got}; it knows {', '.join(known[:MAX_NAMED])}"
    return f"{key}: expected {expected}{more}"


def _report_bad(bad: dict[Path, str], on_bad_image: str, findings: Findings) -> None:
    """Reports the files that do not decode, by an error or a warning.

    Args:
        bad: a dict from each file that does not decode to the reason.
        on_bad_image: "stop" to raise an error, "skip" to log a warning that the files are left out.
        findings: gets the files that are left out.

    Raises:
        Refused: `on_bad_image` is "stop".
    """
    lines = [f"{path}: {reason}" for path, reason in bad.items()]
    files = f"{len(bad)} image file{'s do' if len(bad) > 1 else ' does'} not decode"
    if on_bad_image == "stop":
        advice = "repair or remove them, or leave them out with data.on_bad_image=skip"
        raise Refused(f"data.root: {files}; {advice}:\n{listed(lines)}")
    findings.add(f"{files}, left out:\n{listed(lines)}", lines, logging.WARNING)
