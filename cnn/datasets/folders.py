"""Datasets of the user's files: a folder with one folder of images per class.

Names and structure together say which folders are splits and which are classes. A folder that can
be read in two ways is refused, unless the setting data.layout says which way is meant.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from logging import INFO, WARNING
from pathlib import Path

from cnn.config import DataConfig
from cnn.datasets.findings import Findings
from cnn.datasets.image_files import ENDINGS, Folder, ending_of, heif_hint, read_folder
from cnn.datasets.listing import Listing
from cnn.datasets.names import check_labels, split_of
from cnn.errors import Refused

LAYOUT = "ROOT/CLASS/*.jpg, or ROOT/train/CLASS/*.jpg with val/ and test/ beside train/"
TABLE = "list the files in a table (data.name=csv) with lines such as"
AS_CLASSES = "if they are classes, say data.layout=classes"
MAX_NAMED = 5  # folders in a message

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
    if cfg.layout == "auto":
        _refuse_folds(top, [folder.name for folder in top.folders])
    splits = _find_splits(top, cfg.layout, findings)
    if splits and "train" not in splits and needs_train:
        names = f"{' and '.join(folder.name for folder in splits.values())}, but no train"
        raise Refused(f"data.root: {top.path} has {names}: {LAYOUT}; {AS_CLASSES}")
    parts = splits or {"train": top}
    if cfg.layout == "auto" and "train" in parts:
        _refuse_a_level_too_high(parts["train"], top)
        _refuse_two_readings(parts["train"], top)
    for part in parts.values():
        _check_class_folders(part, top)
        names = [folder.name for folder in part.folders]
        check_labels(str(part.path), dict(zip(names, names)), findings)
    _report_left_out(top, list(parts.values()), findings)
    return {
        split: [(Path(file), each.name) for each in part.folders for file in each.all_images()]
        for split, part in parts.items()
    }


def _read_root(root: Path) -> Folder:
    if not root.is_dir():
        is_file = f"{root} is a file: unpack an archive; for a table say data.name=csv"
        fault = is_file if root.is_file() else f"there is none at {root.resolve()}"
        raise Refused(f"data.root: expected a folder, {LAYOUT}; {fault}")
    top = read_folder(root, deep=False)
    # Each folder is read alone, since a link can give two splits the same images.
    top.folders = [read_folder(folder.path) for folder in top.folders]
    return top


# ---------------------------------------------------------------------------------------------
# Splits


def _find_splits(top: Folder, layout: str, findings: Findings) -> dict[str, Folder]:
    """Finds the folders of the splits inside a dataset's folder.

    The folder of a split has the name of a split and contains class folders. If the dataset has
    splits, a warning lists other folders, which are not used.

    Args:
        top: the folder of the dataset.
        layout: the setting data.layout.
        findings: gets a warning about folders that are not used.

    Returns:
        A dict from "train", "val" or "test" to the folder. A split without a folder is not in the
        dict. If the folders are classes, the dict is empty.

    Raises:
        Refused: two folders belong to the same split, such as val and valid. The folders can be
            splits or classes.
    """
    named = [folder for folder in top.folders if split_of(folder.name)]
    unused = [folder for folder in top.folders if folder not in named]
    if layout == "splits" and not named:
        names = _names(folder.name for folder in unused) or "no folders"
        raise Refused(f"data.layout: splits is for {LAYOUT}; {top.path} has {names}")
    if layout == "classes" or not named:
        return {}
    if layout == "auto" and _are_classes(top, named, unused):
        findings.add(f"{top.path}: {named[0].name} has no class folders, so it is a class")
        return {}
    splits: dict[str, Folder] = {}
    for folder in named:
        split = split_of(folder.name)
        if split in splits:
            both = f"{split}, {splits[split].name} and {folder.name}; keep one of them"
            raise Refused(f"data.root: {top.path} has two folders for {both}; {AS_CLASSES}")
        splits[split] = folder
    if unused:
        names = _names(folder.name for folder in unused)
        advice = "to use a folder, name it train, val or test"
        line = f"{top.path}: beside {named[0].name}, used for nothing: {names}; {advice}"
        findings.add(line, [folder.path for folder in unused], WARNING)
    return splits


def _are_classes(top: Folder, named: list[Folder], others: list[Folder]) -> bool:
    """Returns whether folders with the names of splits are classes, like the folders beside them.

    A folder train that contains images and no class folders can be a class beside other classes.

    Args:
        top: the folder of the dataset.
        named: the folders with the name of a split.
        others: the folders beside them.

    Raises:
        Refused: the structure does not tell.
    """
    others, only_train = _filled(others), [split_of(each.name) for each in named] == ["train"]
    inner, beside = _names_inside(named), _names_inside(others)
    if not inner and not (only_train and others):
        files = [file for folder in named for file in folder.all_images()]
        names = f"{_names(folder.name for folder in named)} without class folders in {top.path}"
        advice = f"sort the images into class folders, or {TABLE} {_table_line(top, files)}"
        raise Refused(f"data.root: expected {LAYOUT}, got {names}: {advice}; or {AS_CLASSES}")
    if inner and only_train and others and not inner & beside:
        first, second = _named_counts(named[0].folders), _named_counts(top.folders)
        readings = f"ROOT/SPLIT/CLASS with {first}, or ROOT/CLASS with {second}"
        advice = "choose data.layout=splits or data.layout=classes"
        raise Refused(f"data.root: {top.path} is {readings}; {advice}")
    return not inner


# ---------------------------------------------------------------------------------------------
# Class folders


def _check_class_folders(part: Folder, top: Folder) -> None:
    """Checks that a split, or a dataset without splits, has class folders with images.

    Args:
        part: the folder that contains the class folders.
        top: the folder of the dataset.

    Raises:
        Refused: there are no class folders, or a class folder has no images. The name of a class
            folder is not valid text.
    """
    if not part.folders:
        above = "name the folder above" if part is top else "move them into a class folder"
        advice = f"if they are of one class, {above}; otherwise {TABLE} "
        advice = f"; it has {_some(len(part.images), 'image')}: {advice}"
        advice = advice + _table_line(top, part.images) if part.images else heif_hint([part])
        fault = f"there are none in {part.path}{advice}"
        raise Refused(f"data.root: expected class folders, {LAYOUT}; {fault}")
    for name in (os.fsencode(folder.name) for folder in part.folders):
        if (text := name.decode("utf-8", "backslashreplace")).encode() != name:
            fault = f"{text} in {part.path}, whose bytes are no UTF-8; rename it"
            raise Refused(f"data.root: expected class folders with readable names, got {fault}")
    empty = [folder for folder in part.folders if not folder.num_images()]
    if empty:
        names = _names(folder.path for folder in empty)
        fault = f"folder {names} has" if len(empty) == 1 else f"folders {names} have"
        hint = heif_hint(inner for folder in empty for inner in folder.all_folders())
        advice = f"({ENDINGS}); put some there or remove the folder{hint}"
        raise Refused(f"data.root: the class {fault} no images {advice}")


def _refuse_a_level_too_high(part: Folder, top: Folder) -> None:
    """Refuses a folder whose only folder with images contains the class folders or the splits."""
    below = part
    while len(filled := _filled(below.folders)) == 1 and not _has_own_images(below):
        if split_of(filled[0].name) and not split_of(below.name):
            break
        below = filled[0]
    is_class = _has_own_images(below) or any(DATE.fullmatch(folder.name) for folder in filled)
    if below is part or is_class or not filled:
        return
    advice = f"name it: data.root={below.path}" if part is top else "move its folders up"
    fault = f"only {below.path}, which contains {_named_counts(filled)}"
    raise Refused(f"data.root: expected class folders in {part.path}, got {fault}; {advice}")


def _refuse_two_readings(part: Folder, top: Folder) -> None:
    """Refuses class folders without images of their own, if the folders inside can be classes.

    If most class folders are without images of their own, folders inside several of them that have
    the same names can be classes, or splits. If all class folders are, so can more folders than
    class folders, unless they are numbered. Dates are not classes.
    """
    filled = _filled(part.folders)
    bare = [folder for folder in filled if not _has_own_images(folder)]
    inner = [each for folder in bare for each in _filled(folder.folders)]
    times = Counter(folder.name for folder in inner)
    if 2 * len(bare) <= len(filled) or len(times) < 2 or any(map(DATE.fullmatch, times)):
        return
    is_numbered = any(re.search(r"\d", name) for name in times)
    is_finer = bare == filled and len(times) > len(filled) and not is_numbered
    if max(times.values()) == 1 and not is_finer:
        return
    _refuse_folds(part, times)
    way, chosen = ("ROOT", "classes") if part is top else (f"ROOT/{part.name}", "splits")
    second, goal, label = "*/CLASS", f"{way}/CLASS", inner[0].name
    if all(map(split_of, times)):
        second, goal = "CLASS/SPLIT", "ROOT/SPLIT/CLASS"
        label = f"{bare[0].name},{split_of(label)}"
    line = _table_line(top, inner[0].all_images(), label)
    raise Refused(
        f"data.root: {part.path} is {way}/CLASS with {_named_counts(filled)}, or {way}/{second}"
        f" with {_named_counts(inner)}; if the first is right, say data.layout={chosen}; if the"
        f" second is, move the images to {goal}, or {TABLE} {line}"
    )


def _refuse_folds(part: Folder, names: Iterable[str]) -> None:
    folds = [name for name in names if FOLD.fullmatch(name)]
    if len(folds) > 1:
        raise Refused(
            f"data.root: {part.path} has folds ({_names(folds)}); move all images to ROOT/CLASS, or"
            " those of one fold to ROOT/val/CLASS and the others to ROOT/train/CLASS, or"
            f" {TABLE} {folds[0]}/1.jpg,CLASS,val; or {AS_CLASSES}"
        )


# ---------------------------------------------------------------------------------------------
# Counts and names for messages


def _filled(folders: Iterable[Folder]) -> list[Folder]:
    return [folder for folder in folders if folder.num_images()]


def _has_own_images(folder: Folder) -> bool:
    return len(folder.images) > STRAY * folder.num_images()


def _names_inside(folders: Iterable[Folder]) -> set[str]:
    return {each.name for folder in folders for each in _filled(folder.folders)}


def _named_counts(folders: Iterable[Folder]) -> str:
    counts: Counter[str] = Counter()
    for folder in folders:
        counts[folder.name] += folder.num_images()
    return _names(f"{name} ({_some(count, 'image')})" for name, count in counts.items())


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _table_line(top: Folder, files: list[str], label: str = "") -> str:
    """Returns a line of a table for the first of some images.

    Args:
        top: the folder of the dataset, to which the path in the line is relative.
        files: the images. Without images, the line has a made-up path.
        label: the class, and perhaps the split. Without one, the letters at the beginning of the
            file name are the class if they differ between the images.
    """
    files = files or [os.path.join(top.path, "1.jpg")]
    starts = [re.match(r"[^\W\d_]*", os.path.basename(file)).group() for file in files]
    label = label or (starts[0] if len(set(starts)) > 1 and starts[0] else "CLASS")
    return f"{os.path.relpath(files[0], top.path)},{label}"


def _report_left_out(top: Folder, parts: list[Folder], findings: Findings) -> None:
    """Reports the files of a dataset that are not used, in one line.

    Args:
        top: the folder of the dataset.
        parts: the folders that contain class folders, which are `top` or the folders of the splits.
        findings: gets the files that are left out.
    """
    above = parts if top in parts else [top, *parts]
    folders = [*above, *(inner for part in parts for inner in part.all_folders()[1:])]
    images = [file for folder in above for file in folder.images]
    others = [file for folder in folders for file in folder.others]
    kinds = Counter(ending_of(file) or "none" for file in others).most_common()
    names = _names(f"{ending} {number}" for ending, number in kinds)
    facts = [f"{_some(len(others), 'file')} with other endings ({names})"] if others else []
    facts += [f"{_some(len(images), 'image')} beside the class folders"] if images else []
    if facts:
        hint, files = heif_hint(folders), others + images
        level = WARNING if images or hint else INFO
        paths = [os.path.relpath(file, top.path) for file in files]
        findings.add(f"left out: {', '.join(facts)}{hint}", paths, level)
