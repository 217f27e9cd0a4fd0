"""The step from listed image files with their class names to the images of each split."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cnn.config import DataConfig
from cnn.config.values import suggest
from cnn.datasets import grouping
from cnn.datasets.copies import Item, check_copies
from cnn.datasets.findings import Findings
from cnn.datasets.images import FileImages, Files
from cnn.datasets.preprocessing import Form
from cnn.datasets.scan import Wanted, match_scaled, scan
from cnn.errors import Refused
from cnn.utils.screen import list_some

# Files of the masks of a segmentation, such as masks/1.png and 1_mask.png.
MASKS = re.compile(r"/(masks|annotations)/[^/]*$|_(mask|seg|gt)\.\w+$", re.IGNORECASE)
DEFAULT_IMAGE_SIZE = 224  # pixels, for images of several sizes if the user sets no size
MAX_NAMED = 20  # classes listed in a message

# By split, for every image: the file, the class name and, in a table with groups, the group's.
Listing = dict[str, list[tuple[Path, str, str | None]]]
FileSplits = dict[str, FileImages]


def read_listing(
    listing: Listing, cfg: DataConfig, findings: Findings, model_classes: list[str] | None = None
) -> tuple[FileSplits, list[str]]:
    """Scans image files and builds the splits of a dataset.

    Args:
        listing: a dict from "train", "val" or "test" to a list of (image file, class, group).
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
            left out. An image has a class that is unknown to the model or to the training. A group
            is in several splits.
    """
    classes = model_classes or sorted({label for _, label, _ in listing["train"]})
    _check_classes(cfg.root, listing, classes, of_model=model_classes is not None)
    items = [(path, label, split) for split, part in listing.items() for path, label, _ in part]
    masks = [path.name for path, *_ in items if MASKS.search(path.as_posix())]
    findings.add_all("image", masks, "named like masks; a mask is no picture of a class")
    paths, root = [path for path, *_ in items], Path(cfg.root)
    groups = _read_groups(cfg, listing, paths)
    plan = partial(_plan_forms, cfg, np.array([split for *_, split in items]))
    scans, bad, pictures = scan(root, paths, plan, verify=cfg.verify, cache_gb=cfg.cache_gb)
    _tell_bad(bad, cfg.on_bad_image == "skip", findings)
    skip = cfg.on_bad_image == "skip"
    files = Files(root, paths, scans, pictures, skip, cache_gb=cfg.cache_gb, groups=groups)
    files, items = _keep(files, items, np.array([path not in bad for path in paths]))
    if cfg.on_duplicate != "ignore":
        match_scaled(files.scans, files.paths)
        stays = check_copies(files.scans["pixels"], items, cfg.on_duplicate, findings)
        files, items = _keep(files, items, stays)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[label] for _, label, _ in items])
    splits = {}
    for split in listing:
        rows = np.flatnonzero([item[2] == split for item in items])
        if not len(rows):
            raise Refused(f"data.root: no image of {split} is left")
        splits[split] = FileImages(files, labels[rows], rows)
    return splits, classes


def _read_groups(cfg: DataConfig, listing: Listing, paths: list[Path]) -> np.ndarray | None:
    """Returns the name of the group of each file (N), by data.group or a table; None without."""
    names = [name for part in listing.values() for *_, name in part]
    if cfg.group:  # "" is for none, whatever a table has
        names = grouping.names_from_paths(cfg.group, Path(cfg.root), paths)
    elif None in names:
        return None
    grouping.refuse_divided(names, [split for split, part in listing.items() for _ in part])
    return np.array(names)


def _tell_bad(bad: dict[Path, str], skips: bool, findings: Findings) -> None:
    reasons = [f"{path}: {why}" for path, why in bad.items()]
    advice = "repair or remove them, or leave them out with data.on_bad_image=skip"
    if skips:
        advice = f"left out: {list_some(reasons)}"
    findings.add_all("image file", reasons, f"cannot be decoded; {advice}", refuse=not skips)


def _keep(files: Files, items: list[Item], stays: np.ndarray) -> tuple[Files, list[Item]]:
    return files.subset(np.flatnonzero(stays)), list(itertools.compress(items, stays))


def _plan_forms(
    cfg: DataConfig, splits: np.ndarray, headers: Iterable[tuple[int, int, bool]]
) -> Wanted:
    """Chooses the forms in which the pictures of a dataset are decoded.

    Without a setting, the image size is that of the training images if they are squares of one
    size, and the images are gray if all files are.

    Args:
        cfg: the section `data` of the settings.
        splits: the split of each file (N).
        headers: the height and width of each image (N), and whether the image is gray. No more
            are taken than needed.

    Returns:
        The forms, each with a mask (N) of the files of which the pictures are needed in this form.
    """
    sides, channels = set(), 1
    for split, (height, width, is_gray) in zip(splits, headers):
        if height:
            sides |= {height, width} if split == "train" else set()
            channels = channels if is_gray else 3
        if (cfg.image_size or len(sides) > 1) and (cfg.channels or channels == 3):
            break
    size = cfg.image_size or (sides.pop() if len(sides) == 1 else DEFAULT_IMAGE_SIZE)
    channels = cfg.channels if cfg.channels in (1, 3) else channels
    form = Form(size, channels, cfg.fit, scaled=cfg.decode == "scaled", value_range=None)
    if all(change.name != "resized_crop" for change in cfg.augment):
        return [(form, np.ones(len(splits), bool))]
    # Until the division, every training image can become one for validation or test.
    is_train = splits == "train"
    is_evaluated = ~is_train | bool({"val", "test"} - set(splits))
    return [(form, is_evaluated), (replace(form, margin=True), is_train)]


def _check_classes(root: str, listing: Listing, classes: list[str], *, of_model: bool) -> None:
    for split, items in listing.items():
        if unknown := sorted({label for _, label, _ in items} - set(classes)):
            owner = "the model" if of_model else "train"
            raise Refused(unknown_classes(f"data.root: {split}", unknown, owner, classes))
    if len(classes) < 2:
        raise Refused(f"data.root: expected at least two classes in {root}, got {classes}")


def unknown_classes(where: str, unknown: list[str], owner: str, known: list[str]) -> str:
    """Returns an error message about unknown classes.

    Args:
        where: the setting that gives the data and the split, such as "data.root: val".
        unknown: the class names that are not known.
        owner: what knows only other classes, such as "the model".
        known: the class names that are known.
    """
    names = [name + suggest(name, known) for name in unknown]
    shown = f"{list_some(names, MAX_NAMED)}; {owner} has {list_some(known, MAX_NAMED)}"
    return f"{where} has classes that {owner} has not: {shown}"
