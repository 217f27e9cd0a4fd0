"""What the data of a run are: logs/data.txt, and who was where: logs/division.csv."""

from collections import Counter

import numpy as np

from cnn.datasets.build import Data
from cnn.datasets.copies import number_groups
from cnn.datasets.images import FileImages
from cnn.records.history import csv_text
from cnn.training.run import Run
from cnn.utils.screen import align_columns, escape_unprintable

# The facts that are logged at the start of a run.
IN_LOG = ("formats", "width x height", "resized to", "cut away")


def facts(run: Run) -> dict[str, str]:
    """Returns the facts about the images of a run, such as their sizes, as texts by name."""
    cfg, data, pre = run.cfg.data, run.data, run.data.preprocessing
    is_files = isinstance(data.train, FileImages)
    groups = {split: images.group_names for split, images in data.splits.items()}
    of = [f"{split} {len(set(names))}" for split, names in groups.items() if names is not None]
    return {
        "source": f"{cfg.name} {cfg.root}" if is_files else cfg.name,
        **(_facts_of_files(data) if is_files else {}),
        "resized to": f"{pre.image_size} x {pre.image_size} pixels; channels: {pre.channels}",
        "data.fit": pre.fit,
        **({"groups": ", ".join(of)} if of else {}),
        **({"positive": data.classes[1]} if len(data.classes) == 2 else {}),
    }


def _facts_of_files(data: Data) -> dict[str, str]:
    """Returns the facts about the image files of all splits."""
    scans = np.concatenate([part.files.scans[part.rows] for part in data.splits.values()])
    area, width, height = scans["width"] * scans["height"], scans["width"], scans["height"]
    kept = np.minimum(width, height) ** 2 if data.preprocessing.fit == "crop" else area
    cut, most = 1 - kept.sum() / area.sum(), 1 - (kept / area).min()
    small, middle, large = np.argsort(area, kind="stable")[[0, len(area) // 2, -1]]
    sizes = [f"{width[index]} x {height[index]}" for index in (small, middle, large)]
    formats = Counter(name.decode() for name in scans["format"].tolist())
    return {
        "formats": ", ".join(f"{name} {number}" for name, number in formats.most_common()),
        "width x height": f"{sizes[0]} to {sizes[2]} pixels, median {sizes[1]}",
        **({"cut away": f"{cut:.0%} of the pixels, at most {most:.0%} of one"} if cut else {}),
        "decoded": f"{(scans['scale'] > 1).sum()} JPEG files at 1/2, 1/4 or 1/8 of their size",
    }


def class_table(data: Data) -> list[list[str]]:
    """Returns a table with the number of images per class and split.

    The first row has the names of the columns. The second row has the numbers for all classes. A
    row per class follows.
    """
    parts, number = data.splits.values(), len(data.classes)
    counts = [np.bincount(images.labels, minlength=number) for images in parts]
    rows = [("class", *data.splits, "all"), ("all", *map(sum, counts), np.sum(counts))]
    rows += [(name, *row, sum(row)) for name, *row in zip(data.classes, *counts, strict=True)]
    return [[str(cell) for cell in row] for row in rows]


def sheet(run: Run) -> str:
    """Returns the text of data.txt.

    The text contains the facts about the images, the number of images per class and split, and
    everything that was found while the data were read.
    """
    table = align_columns(class_table(run.data), right=(1, 2, 3, 4))
    lines = [*align_columns(list(facts(run).items())), "", *table]
    for line, details in run.data.findings.found.items():
        lines += ["", line, *(f"  {detail}" for detail in details)]
    return "\n".join(escape_unprintable(line, keep="\n") for line in lines) + "\n"


def division(run: Run) -> str:
    """Returns the text of division.csv, with a row per image: image, label, split and group.

    Without groups, copies of an image are a group, which has a number, and other images have none.
    """
    parts = run.data.splits
    identities = np.concatenate([images.identities() for images in parts.values()])
    images = (
        (part.name(index), run.data.classes[label], split)
        for split, part in parts.items()
        for index, label in enumerate(part.labels)
    )
    groups = number_groups(identities).tolist()
    if run.data.train.group_names is not None:
        groups = np.concatenate([images.group_names for images in parts.values()]).tolist()
    rows = ((*image, group or "") for image, group in zip(images, groups, strict=True))
    return csv_text(["image", "label", "split", "group"], rows)
