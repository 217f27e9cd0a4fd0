"""A scan of every image file before training: whether it decodes, its size, brightness and content.

The results are kept in the user's cache folder, never beside the images. The result of a file is
used again without opening the file as long as `STATUS` stays the same. It is used again without
decoding the file as long as the bytes of the file stay the same, wherever the file is.
"""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cnn.datasets.cache import array_hash, cache_folder, content_hash
from cnn.datasets.decode import DECODER, GRAY_MODES, deep_values, open_image, to_array
from cnn.datasets.value_range import PER_IMAGE, ValueRange, levels_of
from cnn.errors import BadImage
from cnn.utils.cpus import usable_cpus
from cnn.utils.files import write_atomically

# What tells that a file was changed or replaced: its size in bytes, the times in ns at which its
# content and its entry were changed, and its number in the file system.
STATUS = ("bytes", "changed", "entry_changed", "inode")

# What a scan stores of one file: its status and the time in ns at which it was read; a hash of its
# bytes; the name of its format; the image's height and width, whether it is gray, the sums of the
# pixel values 0..255 and of their squares, each for red, green, blue, and gray, and a hash of these
# pixels. Of an image with more than 8 bits per value, there are also the type of the values, such
# as "uint16", and `levels_of` the values; the hash is of the values.
SCAN = np.dtype(
    [(name, "i8") for name in (*STATUS, "read", "height", "width")]
    + [("content", "u8"), ("format", "S12"), ("gray", "?"), ("sums", "f8", 4)]
    + [("squares", "f8", 4), ("pixels", "u8"), ("kind", "S8"), ("levels", "f8", 5)]
)

# A file can change again without a new time of change, if that follows within the time that the
# clock of the file system takes to advance: 2 s on FAT.
CLOCK = 2 * 10**9  # ns


def scan(
    root: Path, paths: list[Path], *, verify: bool = False, value_range: ValueRange = PER_IMAGE
) -> tuple[np.ndarray, dict[Path, str]]:
    """Returns the sizes and pixel sums of image files, and finds broken files.

    The results are kept in the user's cache folder. A file is read again only if its status differs
    from the cache, or if it was changed less than 2 s before it was read.

    Args:
        root: the folder or CSV file of the dataset. Each dataset has a cache of its own.
        paths: the N image files.
        verify: whether to read all files again.
        value_range: how values of more than 8 bits become bytes for the sums.

    Returns:
        Two values. The first value is an array (N) with one row per path, of the dtype `SCAN` of
        this module. The second value is a dict from each file that does not decode to the reason.
        In the array, the row of a file that does not decode is all zeros.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    if value_range != PER_IMAGE:
        name += "_{}_{}".format(*value_range)
    cache = cache_folder() / f"scan_{DECODER}_{name}.npz"
    names = [os.path.abspath(path) for path in paths]
    known, at = _load(cache)
    rows = np.append(known, np.zeros(1, SCAN))[[at.get(name, -1) for name in names]]
    is_valid = _is_unchanged(rows, paths) & (not verify)
    todo = np.flatnonzero(~is_valid).tolist()
    bad: dict[Path, str] = {}
    if todo:
        read = partial(_scan_file, {row["content"].item(): row for row in known}, value_range)
        with ThreadPoolExecutor(usable_cpus()) as pool:
            results = pool.map(read, (paths[number] for number in todo))
            bar = tqdm(results, "looking at the images", len(todo), disable=None, leave=False)
            for number, result in zip(todo, bar):
                is_valid[number] = not isinstance(result, str)
                if isinstance(result, str):
                    bad[paths[number]], result = result, np.zeros((), SCAN)
                rows[number] = result
        good = np.flatnonzero(is_valid).tolist()
        _store(cache, [names[number] for number in good], rows[good])
    return rows, bad


def _is_unchanged(rows: np.ndarray, paths: Iterable[Path]) -> np.ndarray:
    """Returns for each file whether its row in the cache is still true, bool (N).

    Args:
        rows: the rows of the cache (N). The row of an unknown file is all zeros.
        paths: the N files.
    """
    now = np.array([_status(path) for path in paths], "i8").reshape(-1, len(STATUS))
    same = np.all([rows[name] == now[:, at] for at, name in enumerate(STATUS)], axis=0)
    latest = np.maximum(rows["changed"], rows["entry_changed"])
    return same & (rows["read"] - latest > CLOCK)


def _status(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (-1,) * len(STATUS)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _scan_file(
    known: dict[int, np.ndarray], value_range: ValueRange, path: Path
) -> np.ndarray | str:
    """Reads an image file and returns the size, the pixel sums and the content of the image.

    Args:
        known: a dict from the hash of a file to the row of an earlier scan. A file with the same
            bytes is not decoded again.
        value_range: how values of more than 8 bits become bytes for the sums.
        path: the image file.

    Returns:
        One row of the dtype `SCAN` of this module. If the file does not decode, a text with the
        reason.
    """
    try:
        read, status = time.time_ns(), _status(path)
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a regular file"
        with open(path, "rb") as file:
            content = content_hash(file)
        row = known[content].copy() if content in known else _look_at(path, value_range)
    except OSError as error:
        return error.strerror or str(error)
    except BadImage as bad:
        return str(bad)
    for name, value in zip(STATUS, status):
        row[name] = value
    row["read"], row["content"] = read, content
    return row


def _look_at(path: Path, value_range: ValueRange) -> np.ndarray:
    """Decodes an image and returns a row of the dtype `SCAN` without the facts about the file."""
    image = open_image(path)
    pixels = np.concatenate([to_array(image, channels, value_range) for channels in (3, 1)])
    row = np.zeros((), SCAN)
    row["height"], row["width"] = pixels.shape[1:]  # of 4, H, W
    row["gray"], row["format"] = image.mode in GRAY_MODES, image.format
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
    values = np.arange(256.0)
    row["sums"], row["squares"] = counts @ values, counts @ values**2
    values = deep_values(image)
    if values is not None:
        row["kind"], pixels = values.dtype.name, values.astype(np.float64) + 0.0  # no -0.0
        row["levels"] = levels_of(pixels)
    row["pixels"] = array_hash(pixels)
    return row


def _load(cache: Path) -> tuple[np.ndarray, dict[str, int]]:
    """Reads the rows of an earlier scan.

    Returns:
        Two values. The first value is an array of the dtype `SCAN`. The second value is a dict from
        the absolute path of each file to the index of its row.
    """
    try:
        with np.load(cache, allow_pickle=False) as file:
            names = os.fsdecode(file["names"].tobytes()).split("\0")
            rows = file["rows"]
    except Exception:  # noqa: BLE001  no cache, or a broken one: scan again
        return np.zeros(0, SCAN), {}
    if rows.dtype != SCAN or len(names) != len(rows):
        return np.zeros(0, SCAN), {}
    return rows, {name: index for index, name in enumerate(names)}


def _store(cache: Path, names: list[str], rows: np.ndarray) -> None:
    text = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    with contextlib.suppress(OSError):  # without the cache, the next start only has to scan again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, names=text, rows=rows))
