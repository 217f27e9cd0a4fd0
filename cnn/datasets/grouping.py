"""Groups of images that must not be divided, such as all pictures of a patient.

A model that was trained on one picture of a patient knows the patient's other pictures, too. So no
group is in two of train, val, test or folds.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnn.errors import Refused
from cnn.utils.screen import list_some


def names_from_paths(pattern: str, root: Path, paths: Sequence[Path]) -> list[str]:
    """Returns the name of each file's group: what a regular expression finds in the path.

    If the expression has parentheses, the name is what they contain.

    Args:
        pattern: the setting data.group.
        root: the folder or CSV file of the dataset. Paths begin at the folder, with "/" in between.
        paths: the image files.

    Raises:
        Refused: nothing is found in some paths.
    """
    folder = root if root.is_dir() else root.parent
    texts = [path.as_posix().removeprefix(f"{folder.as_posix()}/") for path in paths]
    found = [re.search(pattern, text) for text in texts]
    if missing := [text for text, match in zip(texts, found) if not match or not match[0]]:
        where = f"in {len(missing)} of {len(texts)} paths: {list_some(missing)}"
        advice = "type data.group=REGEX for these files, or null if none belong together"
        raise Refused(f"data.group: nothing that matches {pattern!r} {where}; {advice}")
    return ["/".join(match.groups("")) or match[0] for match in found]


def refuse_divided(names: Sequence[str], splits: Sequence[str]) -> None:
    """Raises Refused if given splits divide a group.

    Args:
        names: the name of the group of each image.
        splits: the split of each image.
    """
    where = defaultdict(dict)  # a dict of dicts instead of sets, in the order of the images
    for name, split in zip(names, splits, strict=True):
        where[name][split] = None
    divided = [f"{name} in {' and '.join(at)}" for name, at in where.items() if len(at) > 1]
    if divided:
        fault = f"{len(divided)} of {len(where)} groups are in several splits: {list_some(divided)}"
        raise Refused(f"data.group: {fault}; a group must be in one")


def join(names: np.ndarray, identities: np.ndarray) -> np.ndarray:
    """Returns a number per image (N), equal for images of one group and for copies of an image.

    Args:
        names: the name or number of the group of each image (N).
        identities: a number per image (N). Images with equal numbers have equal pixels.
    """
    keys = [np.unique(key, return_inverse=True)[1] for key in (names, identities)]
    numbers, before = keys[0], None
    while before is None or (numbers != before).any():
        before = numbers
        for key in keys:
            lowest = np.full(len(numbers), len(numbers))
            np.minimum.at(lowest, key, numbers)
            numbers = lowest[key]
    return numbers


def hold_out(
    groups: np.ndarray, labels: np.ndarray, fraction: float, order: np.ndarray
) -> np.ndarray:
    """Chooses the groups that are held out for another split.

    About a fraction of each class is held out. A class of two or more groups loses at least one,
    and every class keeps at least one, if that is possible.

    Args:
        groups: the number of the group of each image (N).
        labels: the label of each image (N).
        fraction: the part of each class to hold out, between 0 and 1.
        order: a random permutation of the numbers below N.

    Returns:
        Whether each image is held out, bool (N).
    """
    pairs = np.unique([groups, labels], axis=1)
    is_only_one = np.bincount(pairs[1]) == 1  # by class
    free = np.flatnonzero(~np.isin(groups, pairs[0, is_only_one[pairs[1]]]))
    held = np.zeros(len(labels), bool)
    if not len(free):
        return held
    ranks = np.argsort(order)[free]
    parts = assign(groups[free], labels[free], [1 - fraction, fraction], np.argsort(ranks))
    held[free] = parts == 1
    sizes = np.bincount(groups)
    for label in np.setdiff1d(labels[free], labels[held]):
        numbers = np.intersect1d(groups[free], groups[labels == label])
        for number in numbers[np.argsort(sizes[numbers], kind="stable")]:
            is_group = groups == number
            if not np.setdiff1d(labels[is_group], labels[~held & ~is_group]).size:
                held |= is_group
                break
    return held


def assign(
    groups: np.ndarray, labels: np.ndarray, shares: Sequence[float], order: np.ndarray
) -> np.ndarray:
    """Distributes groups over parts, so that each part gets its share of each class.

    The groups with the most uneven numbers of images per class come first. Each goes where the
    classes are then spread most evenly, as in StratifiedGroupKFold of scikit-learn.

    Args:
        groups: the number of the group of each image (N).
        labels: the label of each image (N).
        shares: the share of all images that each part should get. The sum is 1.
        order: a random permutation of the numbers below N, which decides between equal groups.

    Returns:
        The index of the part of each image, int64 (N).
    """
    names, first, numbers = np.unique(groups[order], return_index=True, return_inverse=True)
    numbers = numbers[np.argsort(order)]
    num_classes, shares = labels.max() + 1, np.asarray(shares)
    cells, counts = np.unique(numbers * num_classes + labels, return_counts=True)
    of_group, classes = np.divmod(cells, num_classes)
    starts = np.searchsorted(of_group, np.arange(len(names) + 1))
    sizes = np.bincount(of_group, counts)
    unevenness = np.bincount(of_group, counts**2) / num_classes - (sizes / num_classes) ** 2
    totals = np.bincount(labels)
    filled = np.zeros((len(shares), num_classes))  # 1 where a part has its share of a class
    load, parts = np.zeros(len(shares)), np.empty(len(names), np.int64)
    alone = np.eye(len(shares))[:, :, None]
    for group in np.lexsort([first, -unevenness]):
        cell = slice(starts[group], starts[group + 1])
        added = counts[cell] / totals[classes[cell]] / shares[:, None]
        spread = (filled[:, classes[cell]] + alone * added).std(1).sum(1)
        best = np.flatnonzero(spread <= spread.min() + 1e-9)
        part = parts[group] = best[np.argmin(load[best])]
        filled[part, classes[cell]] += added[part]
        load[part] += sizes[group] / shares[part]
    return parts[numbers]
