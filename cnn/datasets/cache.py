"""A cache of image files, decoded once to the model's image size and kept between runs.

A cache is a plain array of bytes in the user's cache folder, never beside the images. It is mapped
into memory, so that processes share it. Its name contains a hash of the image files' names, sizes
and times of change, so that a changed dataset gets another cache. It is renamed to this name only
once it is complete.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cnn.datasets.decode import VERSION, decode
from cnn.datasets.preprocessing import resize_and_crop
from cnn.errors import BadImage, Refused
from cnn.utils.cpus import usable_cpus
from cnn.utils.files import write_atomically

OLD = 24 * 3600  # seconds; no decoding takes a day
CHUNK = 256  # images that are decoded together


def cache_folder() -> Path:
    """Returns the path of the folder that contains all caches.

    The folder is $XDG_CACHE_HOME/cnn. If the variable XDG_CACHE_HOME is not set, the folder is
    ~/.cache/cnn. If the user has no home folder either, every access to the returned path raises
    OSError.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if base.startswith("~") else base) / "cnn"


def decode_all(
    root: Path, paths: list[Path], scans: np.ndarray, size: int, channels: int
) -> torch.Tensor:
    """Returns the pixels of image files, resized and cropped to one size.

    The pixels are kept in a file in the user's cache folder. If the cache does not contain the
    pixels, the image files are decoded. If the cache cannot be read or written, the pixels are only
    in memory.

    Args:
        root: the folder or CSV file of the dataset. Each dataset has a cache of its own.
        paths: the N image files.
        scans: an array (N) of the dtype `cnn.datasets.scan.SCAN`. Each row has the size in bytes
            and the time of change of one file. If any size or time has changed since an earlier
            call, all files are decoded again.
        size: height and width of the returned images in pixels.
        channels: 1 for gray, 3 for RGB.

    Returns:
        Pixels, uint8 (N, size, size, channels).

    Raises:
        Refused: a file can no longer be decoded.
    """
    shape = (len(paths), size, size, channels)
    file = cache_folder() / f"pixels_{_key(root, paths, scans, shape)}.bin"
    try:
        if not (file.is_file() and file.stat().st_size == np.prod(shape)):
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent.glob(".pixels_*.tmp"))
            write_atomically(file, lambda out: out.writelines(_decode(paths, size, channels)))
        store = np.memmap(file, np.uint8, mode="c", shape=shape)  # c: changes stay in memory
    except OSError:  # no room or no permission in the cache: the pixels are only in memory
        store = np.empty(shape, np.uint8)
        for number, pixels in enumerate(_decode(paths, size, channels)):
            store[number] = pixels
    return torch.from_numpy(store)


def _key(root: Path, paths: list[Path], scans: np.ndarray, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(os.fsencode(root.resolve()) + repr((VERSION, *shape)).encode())
    digest.update(b"\0".join(map(os.fsencode, paths)))
    digest.update(np.ascontiguousarray(scans["bytes"]).tobytes())
    digest.update(np.ascontiguousarray(scans["changed"]).tobytes())
    return digest.hexdigest()[:32]


def _decode(paths: list[Path], size: int, channels: int) -> Iterator[np.ndarray]:
    """Decodes, resizes and crops image files in several threads.

    Args:
        paths: the image files.
        size: height and width of the resulting images in pixels.
        channels: 1 for gray, 3 for RGB.

    Yields:
        The pixels of one file, uint8 (size, size, channels), in the order of `paths`.

    Raises:
        Refused: a file can no longer be decoded.
    """

    def decode_one(path: Path) -> np.ndarray:
        try:
            image = torch.from_numpy(decode(path, channels))
        except BadImage as bad:
            raise Refused(f"data.root: {path}: decoded a moment ago, and now: {bad}") from None
        return resize_and_crop(image, size).permute(1, 2, 0).contiguous().numpy()

    progress = tqdm(desc="decoding the images once", total=len(paths), disable=None, leave=False)
    with progress, ThreadPoolExecutor(usable_cpus()) as pool:
        for start in range(0, len(paths), CHUNK):  # CHUNK images at most wait in memory
            for pixels in pool.map(decode_one, paths[start : start + CHUNK]):
                progress.update()
                yield pixels


def remove_leftovers(leftovers: Iterable[Path]) -> None:
    """Removes temporary files and folders that are more than a day old.

    A killed process can leave such files. Younger files can still be in use and are kept. Errors
    are ignored.

    Args:
        leftovers: paths of temporary files and folders.
    """
    for path in leftovers:
        with contextlib.suppress(OSError):  # removed by another process, or of another user
            if time.time() - path.stat().st_mtime > OLD:
                (shutil.rmtree if path.is_dir() else os.unlink)(path)
