"""The step from listed image files with their class names to the images of each split."""

import logging
import re
import unicodedata
from pathlib import Path

import numpy as np

from cnn.config import DataConfig
from cnn.config.values import fold, suggest
from cnn.datasets.findings import Findings
from cnn.datasets.images import FileImages, Files
from cnn.datasets.scan import scan
from cnn.errors import Refused

SPLIT_NAMES = {
    "train": r"train(ing|s)?|训练|訓練",
    "val": r"val(id|idation|s)?|dev|development|验证|驗證|校验",
    "test": r"test(ing|s)?|hold-?out|held-?out|测试|測試",
}
# What can stand before and after the name of a split, in any number, as in test_images and 训练集.
BESIDE = (
    r"(?:data|sets?|images?|imgs?|photos?|pictures?|pics?|samples?|splits?|subsets?|parts?"
    r"|folders?|files?|seg|数据|資料|集|样本|樣本|图片|图像|圖片|照片|用|[\W\d_])*"
)
MAX_NAMED = 20  # files or classes listed in a message

Listing = dict[str, list[tuple[Path, str]]]  # by split, (file, class name) for every image
FileSplits = dict[str, FileImages]


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for, or None.

    Args:
        name: the name of a folder, or a cell of a table, such as "Validation", "01_train_images" or
            "测试集".

    Returns:
        "train", "val" or "test". None if the name is not the name of a split.
    """
    name = unicodedata.normalize("NFKC", name).lower()
    for split, names in SPLIT_NAMES.items():
        if re.fullmatch(f"{BESIDE}(?:{names}){BESIDE}", name):
            return split
    return None


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
    _check_names(classes, findings)
    _check_classes(cfg.root, listing, classes, of_model=model_classes is not None)
    paths = [path for items in listing.values() for path, _ in items]
    scans, bad = scan(Path(cfg.root), paths)
    _report_bad(bad, cfg.on_bad_image, findings)
    scans = scans[[path not in bad for path in paths]]
    paths = [path for path in paths if path not in bad]
    channels = 1 if scans["gray"].all() else 3
    files = Files(Path(cfg.root), paths, scans, channels, skip=cfg.on_bad_image == "skip")
    numbers = {name: number for number, name in enumerate(classes)}
    splits, start = {}, 0
    for split, items in listing.items():
        labels = [numbers[label] for path, label in items if path not in bad]
        if not labels:
            raise Refused(f"data.root: no image of {split} decodes")
        splits[split] = FileImages(files, labels, np.arange(start, start + len(labels)))
        start += len(labels)
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


def _check_names(classes: list[str], findings: Findings) -> None:
    """Warns about class names that differ only in case.

    Raises:
        Refused: class names differ only in their Unicode form, so that nobody can tell them apart.
    """
    same = {unicodedata.normalize("NFC", name): name for name in classes}
    if len(same) < len(classes):
        twin = next(name for name in classes if name not in same.values())
        fault = f"{unicodedata.normalize('NFC', twin)} is written in two Unicode forms"
        raise Refused(f"data.root: the class {fault}, which look alike; give both the same name")
    same = {fold(name): name for name in classes}
    twins = [f"{name} and {same[fold(name)]}" for name in classes if name not in same.values()]
    if twins:
        names = ", ".join(twins[:MAX_NAMED])
        line = f"{names} are two classes; if they are one, give both the same name"
        findings.add(line, twins, logging.WARNING)


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

    If all files decode, nothing happens.

    Args:
        bad: a dict from each file that does not decode to the reason.
        on_bad_image: "stop" to raise an error, "skip" to log a warning that the files are left out.
        findings: gets the files that are left out.

    Raises:
        Refused: `bad` is not empty, and `on_bad_image` is "stop".
    """
    if not bad:
        return
    lines = [f"  {path}: {reason}" for path, reason in bad.items()]
    more = [f"  and {len(bad) - MAX_NAMED} more"] if len(bad) > MAX_NAMED else []
    listed = "\n".join([*lines[:MAX_NAMED], *more])
    files = f"{len(bad)} image file{'s do' if len(bad) > 1 else ' does'} not decode"
    if on_bad_image == "stop":
        advice = "repair or remove them, or leave them out with data.on_bad_image=skip"
        raise Refused(f"data.root: {files}; {advice}:\n{listed}")
    findings.add(f"{files}, left out:\n{listed}", lines, logging.WARNING)
