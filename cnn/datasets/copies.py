"""Copies of an image in a dataset: found by their pixels, whatever the names of the files are."""

from collections.abc import Sequence
from logging import INFO

import numpy as np

from cnn.datasets.findings import Findings

Item = tuple[object, str, str]  # the name of an image, its class, and its split

SPLITS = ("train", "val", "test")  # of copies in several splits, those in the last of these stay


def check_copies(
    identities: np.ndarray, items: Sequence[Item], on_duplicate: str, findings: Findings
) -> np.ndarray:
    """Tells the user about copies in a dataset, and chooses which images stay.

    Args:
        identities: a number per image (N). Images with equal numbers have equal pixels.
        items: the name, the class and the split of each image (N).
        on_duplicate: what to do with copies in several splits. "drop" leaves out all but those in
            one split. "stop" raises Refused. "keep" keeps all, also copies under several classes.
        findings: gets a line for each kind of copies.

    Returns:
        Whether each image stays, bool (N).

    Raises:
        Refused: there are copies that `on_duplicate` does not permit.
    """
    stays, rank = np.ones(len(items), bool), np.array([SPLITS.index(item[2]) for item in items])
    within, several_classes, across = [], [], []
    numbers = number_groups(identities)
    copies = np.argsort(numbers, kind="stable")[np.sum(numbers == 0) :]
    starts = np.flatnonzero(np.diff(numbers[copies], prepend=0))
    for group in np.split(copies, starts)[1:]:
        names, labels, splits = zip(*(items[index] for index in group))
        text = " = ".join(map("{} ({}, {})".format, names, labels, splits))
        if len(set(labels)) > 1:
            several_classes.append(text)
        elif len(set(splits)) < len(group):
            within.append(text)
        if len(set(splits)) > 1:
            across.append(text)
            stays[group] = rank[group] == rank[group].max()
    findings.add_all("image", within, "with copies in the same split, each of which counts", INFO)
    several = "under several classes; remove what is wrong, or go on with data.on_duplicate=keep"
    findings.add_all("image", several_classes, several, refuse=on_duplicate != "keep")
    stays |= on_duplicate != "drop"
    num_train, num_val, _ = np.bincount(rank[~stays], minlength=3)
    line = f"in several splits; data.on_duplicate left out {num_train} of train, {num_val} of val"
    findings.add_all("image", across, line, refuse=on_duplicate == "stop")
    return stays


def number_groups(identities: np.ndarray) -> np.ndarray:
    """Returns a number for each image: 0 for an image without copies, else that of its copies.

    Args:
        identities: a number per image (N). Images with equal numbers have equal pixels.

    Returns:
        Numbers from 1 on for the images with copies, int64 (N). Copies have the same number.
    """
    _, place, counts = np.unique(identities, return_inverse=True, return_counts=True)
    has_copies = counts > 1
    return np.where(has_copies, np.cumsum(has_copies), 0)[place]
