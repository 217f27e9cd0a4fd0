"""Image files decoded once, to the size that the model gets, and kept between runs.

The cache is a plain array of bytes in the user's cache folder, never beside the images, mapped into
memory, so that several processes share it. Its name is a hash over the files' names, sizes and times
of change: a changed folder gets another cache. It comes into being under its name only when whole.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from cnn.datasets.decode import VERSION, decode
from cnn.datasets.preprocessing import resize_and_crop
from cnn.errors import BadImage, Refused
from cnn.utils.files import sync_folder

OLD = 24 * 3600  # seconds; no decoding takes a day


def cache_folder() -> Path:
    """Where what was learnt of the user's images is kept between runs.

    Without a home it is no folder: what is tried there fails as on a disk that says no.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if base.startswith("~") else base) / "cnn"


def decode_all(
    root: Path, paths: list[Path], scans: np.ndarray, size: int, channels: int
) -> torch.Tensor:
    """The files' pixels, uint8 (N, size, size, channels), from the cache or decoded into it.

    Raises:
        Refused: a file does not decode any more.
    """
    shape = (len(paths), size, size, channels)
    file = cache_folder() / f"pixels_{_key(root, paths, scans, shape)}.bin"
    try:
        if not (file.is_file() and file.stat().st_size == np.prod(shape)):
            _write(file, paths, shape)
        pixels = np.memmap(file, np.uint8, mode="c", shape=shape)  # c: never written back
    except OSError:  # no room, or no right to write or read there: keep them in memory alone
        pixels = np.empty(shape, np.uint8)
        _decode_into(pixels, paths, size, channels)
    return torch.from_numpy(pixels)


def _key(root: Path, paths: list[Path], scans: np.ndarray, shape: tuple[int, ...]) -> str:
    total = hashlib.sha256(os.fsencode(root.resolve()) + repr((VERSION, *shape)).encode())
    total.update(b"\0".join(map(os.fsencode, paths)))
    total.update(np.ascontiguousarray(scans["bytes"]).tobytes())
    total.update(np.ascontiguousarray(scans["changed"]).tobytes())
    return total.hexdigest()[:32]


def _write(file: Path, paths: list[Path], shape: tuple[int, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(file.parent.glob(".pixels_*.tmp"))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # two processes may be at it
    try:
        with open(temporary, "wb") as out:
            allocate(out, int(np.prod(shape)))
        pixels = np.memmap(temporary, np.uint8, mode="r+", shape=shape)
        _decode_into(pixels, paths, shape[1], shape[3])
        pixels.flush()
        del pixels
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def allocate(out: IO[bytes], size: int) -> None:
    """Makes the file that long, with room on the disk for every byte.

    Writing into a mapped file for which there is none is no OSError but the end of the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(out.fileno(), 0, size)
        return
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        out.write(zeros[: size - start])


def remove_leftovers(leftovers: Iterable[Path]) -> None:
    """Removes what processes killed in the middle left; a young one may still be at work."""
    for path in leftovers:
        with contextlib.suppress(OSError):  # another process was quicker, or it is another user's
            if time.time() - path.stat().st_mtime > OLD:
                (shutil.rmtree if path.is_dir() else os.unlink)(path)


def _decode_into(pixels: np.ndarray, paths: list[Path], size: int, channels: int) -> None:
    def one(number: int) -> None:
        try:
            image = torch.from_numpy(decode(paths[number], channels))
        except BadImage as bad:
            raise Refused(
                f"data.root: {paths[number]}: was whole a moment ago and is not now: {bad}"
            ) from None
        image = resize_and_crop(image, size)  # C, H, W
        pixels[number] = image.permute(1, 2, 0).numpy()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(one, range(len(paths)))
        for _ in tqdm(done, "decoding the images once", len(paths), disable=None, leave=False):
            pass
