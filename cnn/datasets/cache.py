"""A cache of image files, decoded once to the model's image size and kept between runs.

A cache is an array of bytes in the user's cache folder, never beside the images, followed by
a checksum. It is mapped into memory, so that processes share it. Its name contains a hash of the
contents of the image files, so that a changed dataset gets another cache, whatever the names and
times of the files say. It is renamed to this name only once it is complete.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from cnn.datasets.decode import DECODER, decode
from cnn.datasets.preprocessing import resize_and_crop
from cnn.datasets.value_range import ValueRange
from cnn.errors import BadImage, Refused
from cnn.utils.cpus import usable_cpus
from cnn.utils.files import write_atomically

logger = logging.getLogger(__name__)

OLD = 24 * 3600  # seconds; no decoding takes a day
CHUNK = 256  # images that are decoded together
NUM_CRC_BYTES = 4


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
    return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:8])


def array_hash(array: np.ndarray) -> int:
    """Returns a hash of 64 bits of the shape and the values of an array."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return int.from_bytes(digest.digest()[:8])


def decode_all(
    paths: list[Path], scans: np.ndarray, size: int, channels: int, value_range: ValueRange
) -> torch.Tensor:
    """Returns the pixels of image files, resized and cropped to one size.

    The pixels are kept in a file in the user's cache folder. If the cache does not contain the
    pixels, or is damaged, the image files are decoded. If the cache cannot be read or written, the
    pixels are only in memory.

    Args:
        paths: the N image files.
        scans: an array (N) of the dtype `cnn.datasets.scan.SCAN`. Each row has a hash of the
            content of one file.
        size: height and width of the returned images in pixels.
        channels: 1 for gray, 3 for RGB.
        value_range: how values of more than 8 bits become bytes.

    Returns:
        Pixels, uint8 (N, size, size, channels).

    Raises:
        Refused: a file can no longer be decoded, or was changed since the scan.
    """
    shape, contents = (len(paths), size, size, channels), np.ascontiguousarray(scans["content"])
    used = value_range if (scans["kind"] != b"").any() else None  # others do not depend on it
    digest = hashlib.sha256(repr((DECODER, *shape, used)).encode() + contents.tobytes())
    file = cache_folder() / f"pixels_{digest.hexdigest()[:32]}.bin"
    decoded = partial(_decode, paths, contents, size, channels, value_range)
    try:
        store = _open(file, shape)
        if store is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(file.parent.glob(".pixels_*.tmp"))
            write_atomically(file, lambda out: out.writelines(_with_checksum(decoded())))
            store = np.memmap(file, np.uint8, mode="c", shape=shape)  # changes stay in memory
    except OSError:  # no room or no permission in the cache: the pixels are only in memory
        store = np.empty(shape, np.uint8)
        for number, pixels in enumerate(decoded()):
            store[number] = pixels
    return torch.from_numpy(store)


def _open(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Maps a cache into memory, or returns None if there is none or the file is damaged.

    Args:
        file: the file of the cache.
        shape: the shape of the pixels in the file.
    """
    if not file.is_file() or file.stat().st_size != math.prod(shape) + NUM_CRC_BYTES:
        return None
    whole = np.memmap(file, np.uint8, mode="c")
    pixels, checksum = whole[:-NUM_CRC_BYTES], whole[-NUM_CRC_BYTES:]
    if zlib.crc32(pixels) != int.from_bytes(checksum.tobytes()):
        logger.warning("%s: damaged; the images are decoded again", file)
        return None
    return pixels.reshape(shape)


def _with_checksum(decoded: Iterable[np.ndarray]) -> Iterator[np.ndarray | bytes]:
    """Yields the pixels of each image, and at the end a CRC-32 of all of them."""
    checksum = 0
    for pixels in decoded:
        checksum = zlib.crc32(pixels, checksum)
        yield pixels
    yield checksum.to_bytes(NUM_CRC_BYTES)


def _decode(
    paths: list[Path], contents: np.ndarray, size: int, channels: int, value_range: ValueRange
) -> Iterator[np.ndarray]:
    """Decodes, resizes and crops image files in several threads.

    Args:
        paths: the N image files.
        contents: the hash of the content of each file (N).
        size: height and width of the resulting images in pixels.
        channels: 1 for gray, 3 for RGB.
        value_range: how values of more than 8 bits become bytes.

    Yields:
        The pixels of one file, uint8 (size, size, channels), in the order of `paths`.

    Raises:
        Refused: a file can no longer be decoded, or was changed since the scan.
    """

    def decode_one(path: Path, content: int) -> np.ndarray:
        try:
            file = io.BytesIO(path.read_bytes())
            if content_hash(file) != content:
                raise Refused(f"data.root: {path}: changed while the run started; start it again")
            image = torch.from_numpy(decode(file, channels, value_range))
        except (BadImage, OSError) as error:
            reason = f"read a moment ago, and now: {error}"
            raise Refused(f"data.root: {path}: {reason}") from None
        return resize_and_crop(image, size).permute(1, 2, 0).contiguous().numpy()

    progress = tqdm(desc="decoding the images once", total=len(paths), disable=None, leave=False)
    with progress, ThreadPoolExecutor(usable_cpus()) as pool:
        for start in range(0, len(paths), CHUNK):  # CHUNK images at most wait in memory
            chunk = slice(start, start + CHUNK)
            for pixels in pool.map(decode_one, paths[chunk], contents[chunk]):
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
