"""A scan of every image file before training: whether it decodes, its size and its brightness.

The results are kept in the user's cache folder, never beside the images. The result of a file is
used again as long as the file's size and its time of change stay the same.
"""

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cnn.datasets.cache import cache_folder
from cnn.datasets.decode import GRAY_MODES, VERSION, open_image, to_array
from cnn.errors import BadImage
from cnn.utils.cpus import usable_cpus
from cnn.utils.files import write_atomically

# What a scan stores of one file: its size in bytes and its time of change in ns, the image's height
# and width, whether it is gray, and the sums of the pixel values 0..255 and of their squares, each
# for red, green, blue, and gray.
SCAN = np.dtype(
    [(name, "i8") for name in ("bytes", "changed", "height", "width")]
    + [("gray", "?"), ("sums", "f8", 4), ("squares", "f8", 4)]
)


def scan(root: Path, paths: list[Path]) -> tuple[np.ndarray, dict[Path, str]]:
    """Returns the sizes and pixel sums of image files, and finds broken files.

    The results are kept in the user's cache folder. A file is decoded again only if the file's size
    in bytes or time of change differs from the cache.

    Args:
        root: the folder or CSV file of the dataset. Each dataset has a cache of its own.
        paths: the N image files.

    Returns:
        Two values. The first value is an array (N) with one row per path, of the dtype `SCAN` of
        this module. The second value is a dict from each file that does not decode to the reason.
        In the array, the row of a file that does not decode is all zeros.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    cache = cache_folder() / f"scan_{VERSION}_{name}.npz"
    known = _load(cache)
    rows = np.zeros(len(paths), SCAN)
    todo = []
    for number, path in enumerate(paths):
        row = known.get(str(path.resolve()))
        if row is not None and (row["bytes"], row["changed"]) == _size_and_time(path):
            rows[number] = row
        else:
            todo.append(number)
    bad: dict[Path, str] = {}
    if todo:
        with ThreadPoolExecutor(usable_cpus()) as pool:
            results = pool.map(_scan_file, (paths[number] for number in todo))
            bar = tqdm(results, "looking at the images", len(todo), disable=None, leave=False)
            for number, result in zip(todo, bar):
                if isinstance(result, str):
                    bad[paths[number]] = result
                else:
                    rows[number] = result
        good = [number for number, path in enumerate(paths) if path not in bad]
        _store(cache, [str(paths[number].resolve()) for number in good], rows[good])
    return rows, bad


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _scan_file(path: Path) -> np.ndarray | str:
    """Decodes an image file and returns the size and pixel sums of the image.

    Returns:
        One row of the dtype `SCAN` of this module. If the file does not decode, a text with the
        reason.
    """
    try:
        status = path.stat()
        image = open_image(path)
        pixels = np.concatenate([to_array(image, 3), to_array(image, 1)])  # 4, H, W
    except OSError as error:
        return error.strerror or str(error)
    except BadImage as bad:
        return str(bad)
    row = np.zeros((), SCAN)
    row["bytes"], row["changed"] = status.st_size, status.st_mtime_ns
    row["height"], row["width"] = pixels.shape[1:]
    row["gray"] = image.mode in GRAY_MODES
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
    values = np.arange(256.0)
    row["sums"], row["squares"] = counts @ values, counts @ values**2
    return row


def _load(cache: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(cache, allow_pickle=False) as file:
            names = os.fsdecode(file["names"].tobytes()).split("\0")
            rows = file["rows"]
    except Exception:  # noqa: BLE001  no cache, or a broken one: scan again
        return {}
    return dict(zip(names, rows)) if rows.dtype == SCAN and len(names) == len(rows) else {}


def _store(cache: Path, names: list[str], rows: np.ndarray) -> None:
    text = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    with contextlib.suppress(OSError):  # without the cache, the next start only has to scan again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez_compressed(file, names=text, rows=rows))
