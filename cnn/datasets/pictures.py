"""Decoded pictures, kept between runs in packs, which are files in the user's cache folder.

A pack contains a table of pictures in one form, and then the pixels of one picture after the other.
Packs are mapped into memory, so that all processes share them. A picture is found by a hash of the
content of its image file, whatever the name and the times of the file say. Every picture has a
checksum, which is compared when a process reads the picture first. A pack gets its name once it is
complete. A picture that is not found, or is damaged, is decoded again.
"""

import contextlib
import functools
import hashlib
import logging
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch

from cnn.datasets.cache import cache_folder, make_room
from cnn.datasets.decode import DECODER
from cnn.datasets.preprocessing import Form
from cnn.utils.files import write_atomically

logger = logging.getLogger(__name__)

PACK_BYTES = 2**26  # a pack is written once it is this large; a killed start loses no more

# One picture: the hash of its file, its first byte among the pixels, its size, and a CRC-32. In
# memory, the first byte counts from the beginning of the pack, and the pack has a number.
ENTRY = np.dtype(
    [("content", "u8"), ("start", "i8"), ("height", "i4"), ("width", "i4"), ("crc", "u4")]
    + [("pack", "i4")]
)


class Pictures:
    """The decoded pictures of image files, in one form, as far as they are in the cache.

    Args:
        form: the form of the pictures.
        paths: the packs.
        entries: the place of each picture in the packs, of the dtype ENTRY (N). The height is 0 if
            the picture is not in the cache.
        is_wanted: whether the picture of each file is wanted, bool (N).
    """

    def __init__(self, form: Form, paths: list[Path], entries: np.ndarray, is_wanted: np.ndarray):
        self.form, self.paths, self.entries, self.is_wanted = form, paths, entries, is_wanted
        self._is_checked = np.zeros(len(entries), bool)
        self._mapped: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict:
        # Another process maps the packs itself.
        return self.__dict__ | {"_mapped": {}, "_is_checked": np.zeros(len(self.entries), bool)}

    @property
    def is_kept(self) -> np.ndarray:
        """Whether each picture is in the cache, bool (N)."""
        return self.entries["height"] > 0

    @property
    def used_paths(self) -> set[Path]:
        """The packs that contain pictures of these image files."""
        return {self.paths[number] for number in np.unique(self.entries["pack"][self.is_kept])}

    def subset(self, rows: np.ndarray) -> "Pictures":
        """Returns the pictures of some of the image files.

        Args:
            rows: the indices of the image files, or whether each image file is returned.
        """
        return Pictures(self.form, self.paths, self.entries[rows], self.is_wanted[rows])

    def get(self, row: int) -> torch.Tensor | None:
        """Returns a picture, uint8 (C, H, W), or None if it is not in the cache or is damaged.

        Args:
            row: the index of the image file.
        """
        _, start, height, width, crc, pack = self.entries[row].item()
        if not height:
            return None
        pixels = self._map(pack)[start : start + height * width * self.form.channels]
        if not self._is_checked[row] and zlib.crc32(pixels.numpy()) != crc:
            if len(self._map(pack)):
                _remove_damaged(self.paths[pack])
            self.entries[row]["height"] = 0
            return None
        self._is_checked[row] = True
        return pixels.view(height, width, self.form.channels).permute(2, 0, 1)

    def _map(self, pack: int) -> torch.Tensor:
        """Returns the bytes of a pack, which are empty if it cannot be read, uint8 (bytes).

        Changes of the bytes stay in memory. Unlike a memmap of NumPy, a mapped pack keeps no file
        open, of which a process may have as few as 256.
        """
        if pack not in self._mapped:
            path, mapped = self.paths[pack], torch.empty(0, dtype=torch.uint8)
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # removed, or not ours
                mapped = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            self._mapped[pack] = mapped
        return self._mapped[pack]


class PackWriter:
    """Finds the pictures of image files in one form, and writes those that lack into new packs.

    An error while writing ends the writing. The pictures that are not in the cache are then decoded
    whenever they are needed.

    Args:
        form: the form of the pictures.
        contents: a hash of the content of each image file, uint64 (N). 0 if unknown.
        is_wanted: whether the picture of each file is wanted, bool (N).
        cache_gb: how many GB of pictures the cache may contain. None stands for a quarter of the
            free space.
        in_use: the packs that must stay, to which the packs of this form are added.

    Attributes:
        form: the form of the pictures.
    """

    def __init__(
        self,
        form: Form,
        contents: np.ndarray,
        is_wanted: np.ndarray,
        cache_gb: float | None,
        in_use: set[Path],
    ):
        self.form, self._is_wanted, self._cache_gb = form, is_wanted, cache_gb
        digest = hashlib.sha256(repr((DECODER, form)).encode()).hexdigest()
        self._prefix = f"pictures_{digest[:16]}_"
        self._kept, self._in_use, self._num_written = self.find(contents), in_use, 0
        self._waiting, self._entries, self._size = [], [], 0
        self._reason = "no room (data.cache_gb)"
        in_use |= self._kept.used_paths

    @functools.cached_property
    def lacks(self) -> np.ndarray:
        """Whether the picture of each file is wanted, not in the cache, and has room, bool (N)."""
        lacks = self._is_wanted & ~self._kept.is_kept
        expected = int(lacks.sum()) * self.form.size**2 * self.form.channels
        self._has_room = self._make_room(min(expected, PACK_BYTES))
        return lacks & self._has_room

    def find(self, contents: np.ndarray) -> Pictures:
        """Returns the pictures of image files, as far as they are in the cache.

        Args:
            contents: a hash of the content of each image file, uint64 (N).
        """
        paths = sorted(cache_folder().glob(f"{self._prefix}*.bin"))
        tables = [np.zeros(1, ENTRY), *map(_read_table, paths)]
        for number, table in enumerate(tables):
            table["pack"] = number - 1
        table = np.concatenate(tables)
        self._known, first = np.unique(table["content"], return_index=True)
        places = np.searchsorted(self._known, contents).clip(max=len(first) - 1)
        is_found = (self._known[places] == contents) & self._is_wanted
        entries = np.where(is_found, table[first][places], np.zeros((), ENTRY))
        return Pictures(self.form, paths, entries, self._is_wanted)

    def needs(self, number: int, content: int) -> bool:
        """Returns whether the picture of a file lacks.

        Args:
            number: the index of the file.
            content: the hash of the content of the file, which was not known before.
        """
        place = np.searchsorted(self._known, np.uint64(content))
        return bool(self.lacks[number]) and content not in self._known[place : place + 1]

    def add(self, content: int, picture: torch.Tensor) -> None:
        """Adds a picture to the pack that is written next.

        Args:
            content: the hash of the content of the image file.
            picture: the pixels, uint8 (C, H, W).
        """
        if self._has_room:
            pixels = picture.permute(1, 2, 0).contiguous().numpy()
            self._entries.append((content, self._size, *pixels.shape[:2], zlib.crc32(pixels), 0))
            self._waiting.append(pixels)
            self._size += pixels.nbytes
            if self._size >= PACK_BYTES:
                self._write()

    def finish(self, contents: np.ndarray) -> Pictures:
        """Writes the rest, and returns the pictures of image files.

        Args:
            contents: a hash of the content of each image file, uint64 (N).
        """
        if self._waiting:
            self._write()
        pictures, where = self.find(contents), cache_folder()
        use = "for random crops" if self.form.margin else f"of {self.form.size} x {self.form.size}"
        if self._num_written:
            logger.info("%d decoded pictures %s are kept in %s", self._num_written, use, where)
        if not self._has_room and (missing := (self._is_wanted & ~pictures.is_kept).sum()):
            reason = f"cannot be kept in {where}: {self._reason}"
            logger.warning("%d decoded pictures %s %s", missing, use, reason)
        for path in pictures.used_paths:
            with contextlib.suppress(OSError):  # removed by another process, or of another user
                os.utime(path)  # the packs that were not used for the longest time are removed
        return pictures

    def _write(self) -> None:
        """Writes the pictures that wait into a pack."""
        path = cache_folder() / f"{self._prefix}{uuid.uuid4().hex[:16]}.bin"
        table, pixels = np.array(self._entries, ENTRY), self._waiting
        self._has_room = self._make_room(self._size)
        try:
            if self._has_room:
                write_atomically(path, lambda file: (np.save(file, table), file.writelines(pixels)))
                self._in_use.add(path)
                self._num_written += len(table)
        except OSError as error:
            self._has_room, self._reason = False, error.strerror
        self._waiting, self._entries, self._size = [], [], 0

    def _make_room(self, size: int) -> bool:
        try:
            return make_room(size, self._cache_gb, self._in_use)
        except OSError as error:  # no permission, or no folder
            self._reason = error.strerror
            return False


def _read_table(pack: Path) -> np.ndarray:
    """Returns the table of a pack, of the dtype ENTRY, which is empty if it cannot be read."""
    try:
        with open(pack, "rb") as file:
            table = np.load(file, allow_pickle=False).astype(ENTRY, casting="no")
            table["start"] += file.tell()  # the pixels follow
            return table
    except (OSError, ValueError, TypeError, EOFError) as error:
        if not isinstance(error, OSError):  # removed by another process, or of another user
            _remove_damaged(pack)
        return np.zeros(0, ENTRY)


def _remove_damaged(pack: Path) -> None:
    """Removes a damaged pack, and tells the user. Nothing happens if the pack cannot be removed."""
    with contextlib.suppress(OSError):  # removed by another process, or of another user
        pack.unlink()  # mapped pictures stay until the process ends
        logger.warning("%s: damaged; its pictures are decoded again", pack)
