"""Datasets of the user's files: a folder with one folder of images per class.

Names and structure together say which folders are splits and which are classes. A folder that can
be read in two ways is refused, unless the setting data.layout says which way is meant.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from logging import WARNING
from pathlib import Path

from cnn.config import DataConfig
from cnn.datasets.findings import Findings
from cnn.datasets.image_files import ENDINGS, Folder, ending_of, read_folder
from cnn.datasets.listing import Listing
from cnn.datasets.names import check_labels, split_of
from cnn.errors import Refused
from cnn.utils.screen import list_some

LAYOUT = "ROOT/CLASS/*.jpg, or ROOT/train/CLASS/*.jpg with val/ and test/ beside train/"
TABLE = "list the files in a table (data.name=csv): path,label, then lines such as cat_1.jpg,cat"
AS_CLASSES = "if they are classes, say data.layout=classes"

DATE = re.compile(r"(19|20)\d\d(\D.*|\d{4})?")  # 2019, 2019-03 or 20190301 is never a class
FOLD = re.compile(r"(k?[\W_]*folds?|cv|第|折)[\W_]*\d+[\W_]*折?", re.IGNORECASE)
STRAY = 0.1  # up to this share of a folder's images can be strays from the folders inside


def list_folder(cfg: DataConfig, findings: Findings, *, needs_train: bool = True) -> Listing:
    """Lists the images of a folder that has one folder per class.

    The images are in ROOT/SPLIT/CLASS/ or, without splits, in ROOT/CLASS/. SPLIT is a usual name of
    a split, such as train, val or test. CLASS is the name of a class. A class folder can contain
    further folders.

    Args:
        cfg: the section `data` of the settings. `cfg.root` is the folder ROOT. `cfg.layout` says
            whether the folders in ROOT are classes or splits.
        findings: gets the facts that the user has to know, such as folders that are not used.
        needs_train: whether training images are required.

    Returns:
        The images by split. Without splits, all images are under "train".

    Raises:
        Refused: the folder or the training images are missing, or a class folder is empty. A split
            has two folders, such as val and valid. The folder can be read in two ways.
    """
    top = _read_root(Path(cfg.root))
    splits = _find_splits(top, cfg.layout, findings)
    is_without_train = needs_train and splits and "train" not in splits
    if is_without_train or (cfg.layout == "splits" and not splits):
        names = f"{list_some([folder.name for folder in top.folders]) or 'no folders'}, no train"
        raise Refused(f"data.root: expected {LAYOUT}; {top.path} has {names}; {AS_CLASSES}")
    parts = splits or {"train": top}
    if cfg.layout == "auto" and "train" in parts:
        _refuse_a_level_too_high(parts["train"], top)
        _refuse_finer_classes(parts["train"], top)
    for part in parts.values():
        _check_class_folders(part, top)
        names = [folder.name for folder in part.folders]
        check_labels(part.path, dict(zip(names, names)), findings)
    _report_left_out(top, list(parts.values()), findings)
    return {
        split: [
            (Path(file), each.name, None) for each in part.folders for file in each.all_images()
        ]
        for split, part in parts.items()
    }


def _read_root(root: Path) -> Folder:
    if not root.is_dir():
        fault = f"there is none at {root.resolve()}; unpack archives; for a table say data.name=csv"
        raise Refused(f"data.root: expected a folder, {LAYOUT}; {fault}")
    top = read_folder(root, deep=False)
    # Each folder is read alone, since a link can give two splits the same images.
    top.folders = [read_folder(folder.path) for folder in top.folders]
    return top


def _find_splits(top: Folder, layout: str, findings: Findings) -> dict[str, Folder]:
    """Finds the folders of the splits inside a dataset's folder.

    The folder of a split has the name of a split. A folder train that contains images and no class
    folders is a class if other class folders stand beside it.

    Args:
        top: the folder of the dataset.
        layout: the setting data.layout.
        findings: gets the fact that a folder with the name of a split is a class.

    Returns:
        A dict from "train", "val" or "test" to the folder. A split without a folder is not in the
        dict. If the folders are classes, the dict is empty.

    Raises:
        Refused: two folders belong to the same split, such as val and valid. The folders are folds,
            or can be splits or classes.
    """
    named = [folder for folder in top.folders if split_of(folder.name)]
    if layout == "classes":
        return {}
    if layout == "auto":
        _refuse_folds(top, top.folders)
        others = _filled(folder for folder in top.folders if folder not in named)
        if others and [split_of(folder.name) for folder in named] == ["train"]:
            inner, beside = _inside(named), _inside(others)
            if not inner:
                findings.add(f"{top.path}: {named[0].name} has no class folders, so it is a class")
                return {}
            if not _names(inner) & _names(beside):
                readings = {"ROOT/SPLIT/CLASS": inner, "ROOT/CLASS": top.folders}
                _refuse(top, readings, "choose data.layout=splits or data.layout=classes")
    splits = {split_of(folder.name): folder for folder in named}
    if len(splits) < len(named):
        fault = list_some([f"{each.name} ({split_of(each.name)})" for each in named])
        several = f"several folders for one split: {fault}; keep one for each; {AS_CLASSES}"
        raise Refused(f"data.root: {top.path} has {several}")
    return splits


def _check_class_folders(part: Folder, top: Folder) -> None:
    """Checks that a split, or a dataset without splits, has class folders with images.

    Args:
        part: the folder that contains the class folders.
        top: the folder of the dataset.

    Raises:
        Refused: there are no class folders, or a class folder has no images. The name of a class
            folder is not valid text.
    """
    where = f"data.root: expected class folders, {LAYOUT}"
    if not part.folders:
        fault = f"{part.path} has none, and {len(part.images)} images ({ENDINGS})"
        advice = f"move the images into class folders or {TABLE}"
        also = "" if part is top else f"; {AS_CLASSES}"
        raise Refused(f"{where}; {fault}; {advice}{also}")
    shown = [os.fsencode(each.name).decode("utf-8", "backslashreplace") for each in part.folders]
    if unreadable := [name for name in shown if name not in _names(part.folders)]:
        names = f"{list_some(unreadable)} in {part.path}"
        raise Refused(f"{where}; names whose bytes are no UTF-8: {names}; rename them")
    if empty := [folder.path for folder in part.folders if not folder.num_images()]:
        fault = f"the class folder has no images: {list_some(empty)} ({ENDINGS})"
        raise Refused(f"data.root: {fault}; put some there or remove the folder")


# ---------------------------------------------------------------------------------------------
# Folders that can be read in two ways


def _refuse_a_level_too_high(part: Folder, top: Folder) -> None:
    """Refuses a folder whose only folder with images contains the class folders or the splits."""
    below = part
    while len(filled := _filled(below.folders)) == 1 and not _has_own_images(below):
        if split_of(filled[0].name) and not split_of(below.name):
            break
        below = filled[0]
    if below is part or _has_own_images(below) or any(map(DATE.fullmatch, _names(filled))):
        return
    advice = f"name it: data.root={below.path}" if part is top else "move its folders up"
    fault = f"only {below.path}, which has images in {_counts(filled)}"
    raise Refused(f"data.root: expected class folders in {part.path}, got {fault}; {advice}")


def _refuse_finer_classes(part: Folder, top: Folder) -> None:
    """Refuses class folders without images of their own, if the folders inside can be classes.

    If most class folders are without images of their own, folders inside several of them that have
    the same names can be classes, or splits. If all class folders are, so can more folders than
    class folders, unless they are numbered. Dates are not classes.
    """
    filled = _filled(part.folders)
    bare = [folder for folder in filled if not _has_own_images(folder)]
    inner = _inside(bare)
    while len(_names(inner)) == 1 and not any(map(_has_own_images, inner)):
        inner = _inside(inner)  # as in part1/photos/CLASS beside part2/photos/CLASS
    names = _names(inner)
    if 2 * len(bare) <= len(filled) or len(names) < 2 or any(map(DATE.fullmatch, names)):
        return
    is_finer = bare == filled and len(names) > len(filled)
    if len(names) == len(inner) and (not is_finer or re.search(r"\d", "".join(names))):
        return
    _refuse_folds(part, inner)
    way, chosen = ("ROOT", "classes") if part is top else (f"ROOT/{part.name}", "splits")
    second, goal = f"{way}/*/CLASS", f"{way}/CLASS"
    if all(map(split_of, names)):
        second, goal = "ROOT/CLASS/SPLIT", "ROOT/SPLIT/CLASS"
    readings = {f"{way}/CLASS": filled, second: inner}
    advice = f"for the second, move the images to {goal} or {TABLE}"
    _refuse(part, readings, f"for the first, say data.layout={chosen}; {advice}")


def _refuse_folds(part: Folder, folders: list[Folder]) -> None:
    folds = sorted(filter(FOLD.fullmatch, _names(folders)))
    if len(folds) > 1:
        advice = "move those for validation to ROOT/val/CLASS and all others to ROOT/train/CLASS"
        fault = f"has images in folds ({list_some(folds)})"
        raise Refused(f"data.root: {part.path} {fault}; {advice}, or {TABLE}; {AS_CLASSES}")


def _refuse(part: Folder, readings: dict[str, list[Folder]], advice: str) -> None:
    shown = [f"{way} with images in {_counts(folders)}" for way, folders in readings.items()]
    raise Refused(f"data.root: {part.path} can be read as {', or as '.join(shown)}; {advice}")


# ---------------------------------------------------------------------------------------------
# Counts and names


def _filled(folders: Iterable[Folder]) -> list[Folder]:
    return [folder for folder in folders if folder.num_images()]


def _inside(folders: Iterable[Folder]) -> list[Folder]:
    return [inner for folder in folders for inner in _filled(folder.folders)]


def _names(folders: Iterable[Folder]) -> set[str]:
    return {folder.name for folder in folders}


def _has_own_images(folder: Folder) -> bool:
    return len(folder.images) > STRAY * folder.num_images()


def _counts(folders: Iterable[Folder]) -> str:
    """Returns the names of some folders with their numbers of images, such as "cat (4), dog (2)".

    The images of folders with the same name are counted together.
    """
    counts = Counter(folder.name for folder in folders for _ in folder.all_images())
    return list_some([f"{name} ({count})" for name, count in counts.items()])


def _report_left_out(top: Folder, parts: list[Folder], findings: Findings) -> None:
    """Reports the folders and files of a dataset that are not used, in one line.

    Args:
        top: the folder of the dataset.
        parts: the folders that contain class folders, which are `top` or the folders of the splits.
        findings: gets what is left out.
    """
    above = {folder.path: folder for folder in (top, *parts)}.values()
    inside = [inner for part in parts for inner in part.all_folders()[1:]]
    unused = [] if top in parts else [folder for folder in top.folders if folder not in parts]
    left_out = {f"{folder.name}/": folder.all_images() for folder in unused}
    beside = [image for folder in above for image in folder.images]
    left_out["images beside the class folders"] = beside
    for file in (file for folder in (*above, *inside) for file in folder.others):
        left_out.setdefault(f"*{ending_of(file)}", []).append(file)
    counts = [f"{kind} ({len(paths)})" for kind, paths in left_out.items() if paths]
    if counts:
        used = f"used are train/, val/ and test/, images in class folders, and {ENDINGS}"
        paths = [os.path.relpath(path, top.path) for paths in left_out.values() for path in paths]
        findings.add(f"{top.path}: left out: {list_some(counts)}; {used}", paths, WARNING)
