"""The user's cache folder, which keeps facts about image files and decoded pictures between runs.

Everything in the folder can be deleted at any time, and is made again when it is needed. The folder
is never beside the images.
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO

import numpy as np

OLD = 24 * 3600  # seconds; no temporary file is written for a day
FREE_SHARE = 4  # the cache takes a quarter of the space that is free without it
RESERVE = 10**9  # bytes of the disk that stay free, for checkpoints and logs
PACKS = "pictures_*.bin"


def cache_folder() -> Path:
    """Returns the path of the folder that contains all caches.

    The folder is $XDG_CACHE_HOME/cnn. If the variable XDG_CACHE_HOME is not set, the folder is
    ~/.cache/cnn. If the user has no home folder either, every access to the returned path raises
    OSError.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if base.startswith("~") else base) / "cnn"


def content_hash(file: IO[bytes]) -> int:
    """Returns a hash of 64 bits of a file that is open for reading in binary mode."""
    digest = hashlib.sha256()
    while block := file.read(2**18):
        digest.update(block)
    return int.from_bytes(digest.digest()[:8], "big")


def array_hash(array: np.ndarray) -> int:
    """Returns a hash of 64 bits of the shape and the values of an array."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return int.from_bytes(digest.digest()[:8], "big")


def make_room(needed: int, cache_gb: float | None, in_use: Collection[Path]) -> bool:
    """Removes the pictures that were not used for the longest time, until there is enough room.

    Args:
        needed: the bytes that will be written.
        cache_gb: how many GB of pictures the cache folder may then contain. None stands for a
            quarter of the space that would be free without the pictures.
        in_use: files of pictures that must stay.

    Returns:
        Whether there is enough room. If even all spare pictures would not do, nothing is removed.

    Raises:
        OSError: the cache folder cannot be used.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.glob(".pictures_*"))
    packs = {}
    for path in folder.glob(PACKS):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            packs[path] = path.stat()
    used, free = sum(pack.st_size for pack in packs.values()), shutil.disk_usage(folder).free
    limit = (free + used) // FREE_SHARE if cache_gb is None else cache_gb * 1e9
    room = min(limit - used, free - RESERVE)
    spare = sorted(packs.keys() - set(in_use), key=lambda path: packs[path].st_mtime)
    if room + sum(packs[path].st_size for path in spare) < needed:
        return False
    for path in spare:
        # A pack of another user stays, and on Windows one that another process maps.
        with contextlib.suppress(PermissionError):
            if room < needed:
                path.unlink(missing_ok=True)
                room += packs[path].st_size
    return room >= needed


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
