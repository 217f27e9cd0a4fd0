"""Copies of an image in a dataset: found by their pixels, whatever the names of the files are."""

from collections.abc import Sequence
from logging import INFO, WARNING

import numpy as np

from cnn.datasets.findings import Findings, listed
from cnn.errors import Refused

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
        Refused: copies have several classes, or are in several splits, and `on_duplicate` does not
            permit that.
    """
    stays, rank = np.ones(len(items), bool), np.array([SPLITS.index(item[2]) for item in items])
    within, several_classes, across = [], [], []
    for group in _groups(identities):
        copies = [items[index] for index in group]
        text = " = ".join(f"{name} ({label}, {split})" for name, label, split in copies)
        if len({label for _, label, _ in copies}) > 1:
            several_classes.append(text)
        if len(set(rank[group])) < len(group):
            within.append(text)
        if len(set(rank[group])) > 1:
            across.append(text)
            stays[group] = rank[group] == rank[group].max()
    left_out = [f"{np.sum(~stays[rank == r])} of {split}" for r, split in enumerate(SPLITS[:2])]
    drops = on_duplicate == "drop"
    advice = f"left out: {' and '.join(left_out)}" if drops else "data.on_duplicate=drop keeps one"
    for level, found, line, refused in (
        (INFO, within, "with copies in the same split, each of which counts", False),
        (
            WARNING,
            several_classes,
            "under several classes; remove what is wrong, or go on with data.on_duplicate=keep",
            on_duplicate != "keep",
        ),
        (WARNING, across, f"in several splits; {advice}", on_duplicate == "stop"),
    ):
        line = f"{len(found)} image{'s' if len(found) > 1 else ''} {line}"
        if found and refused:
            raise Refused(f"data.root: {line}:\n{listed(found)}")
        if found:
            findings.add(line, found, level)
    return stays if drops else np.ones(len(items), bool)


def _groups(identities: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of the images that have copies, an array for each such image."""
    order = np.argsort(identities, kind="stable")
    borders = np.flatnonzero(np.diff(identities[order].view(np.int64))) + 1
    return [group for group in np.split(order, borders) if len(group) > 1]
