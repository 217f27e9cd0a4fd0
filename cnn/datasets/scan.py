"""Looks at every image file once before training: does it decode, how large, how bright?

The answers are kept in the user's cache folder, never beside the images, and hold as long as a
file keeps its size and time of change.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cnn.datasets.cache import cache_folder
from cnn.datasets.decode import GRAY_MODES, VERSION, open_image, to_array
from cnn.errors import BadImage
from cnn.utils.files import write_atomically

SCAN = np.dtype(
    [
        ("bytes", "i8"),
        ("changed", "i8"),  # ns
        ("height", "i8"),
        ("width", "i8"),
        ("gray", "?"),
        ("sums", "f8", 4),  # of the pixels' values: red, green, blue, and gray
        ("squares", "f8", 4),
    ]
)


def scan(root: Path, paths: list[Path]) -> tuple[np.ndarray, dict[Path, str]]:
    """Decodes each file, or remembers having done so.

    Returns:
        A row (SCAN) a path, and for each file that does not decode, why.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    cache = cache_folder() / f"scan_{VERSION}_{name}.npz"
    known = _load(cache)
    rows = np.zeros(len(paths), SCAN)
    bad: dict[Path, str] = {}
    todo = []
    for number, path in enumerate(paths):
        row = known.get(str(path.resolve()))
        try:
            status = path.stat()
        except OSError as error:
            bad[path] = error.strerror or str(error)
            continue
        if row is not None and (row["bytes"], row["changed"]) == (
            status.st_size,
            status.st_mtime_ns,
        ):
            rows[number] = row
        else:
            todo.append(number)
    if todo:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(_look, (paths[number] for number in todo))
            bar = tqdm(results, "looking at the images", len(todo), disable=None, leave=False)
            for number, result in zip(todo, bar):
                if isinstance(result, str):
                    bad[paths[number]] = result
                else:
                    rows[number] = result
        _store(cache, [path for path in paths if path not in bad], rows, paths)
    return rows, bad


def _look(path: Path) -> np.ndarray | str:
    row = np.zeros((), SCAN)
    try:
        status = path.stat()
        image = open_image(path)
        gray = image.mode in GRAY_MODES
        pixels = np.concatenate([to_array(image, 3), to_array(image, 1)])
    except (BadImage, OSError) as error:
        return str(error)
    row["bytes"], row["changed"] = status.st_size, status.st_mtime_ns
    row["height"], row["width"], row["gray"] = *pixels.shape[1:], gray
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
    values = np.arange(256.0)
    row["sums"], row["squares"] = counts @ values, counts @ values**2
    return row


def _load(cache: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(cache, allow_pickle=False) as file:
            names = os.fsdecode(file["names"].tobytes()).split("\0")
            rows = file["rows"]
    except Exception:  # noqa: BLE001  no cache, or a broken one: look again
        return {}
    return dict(zip(names, rows)) if rows.dtype == SCAN and len(names) == len(rows) else {}


def _store(cache: Path, good: list[Path], rows: np.ndarray, paths: list[Path]) -> None:
    keep = set(good)
    names = [str(path.resolve()) for path in paths if path in keep]
    chosen = rows[[path in keep for path in paths]]

    def write(file) -> None:
        text = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
        np.savez_compressed(file, names=text, rows=chosen)

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, write)
    except OSError:
        pass  # without the cache the next start looks again, nothing else
