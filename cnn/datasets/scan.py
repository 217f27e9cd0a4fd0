"""The one pass over all image files before training, in which each file is read and decoded once.

The pass finds out whether the file decodes, its size, brightness and content, and decodes the
pictures for training and evaluation. The results are kept in the user's cache folder, never beside
the images. The result of a file is used again without opening the file as long as `STATUS` stays
the same. It is used again without decoding the file as long as the bytes of the file stay the same,
wherever the file is.
"""

import contextlib
import hashlib
import io
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnn.datasets import decode
from cnn.datasets.cache import array_hash, cache_folder, content_hash
from cnn.datasets.pictures import PackWriter, Pictures
from cnn.datasets.preprocessing import Form
from cnn.datasets.value_range import PER_IMAGE, ValueRange, levels_of
from cnn.errors import BadImage
from cnn.utils.cpus import usable_cpus
from cnn.utils.files import write_atomically
from cnn.utils.progress import show_progress

# What tells that a file was changed or replaced: its size in bytes, the times in ns at which its
# content and its entry were changed, and its number in the file system.
STATUS = ("bytes", "changed", "entry_changed", "inode")

# What a scan stores of one file: its status and the time in ns at which it was read; a hash of its
# bytes; the name of its format; the image's height and width, whether it is gray, and by how much
# its decoding was scaled, 0 if all pixels count; the number of pixels that count, the sums of their
# values 0..255 and of the squares, each for red, green, blue, and gray, and a hash of the pixels.
# Of an image with more than 8 bits per value, there are also the type of the values, such as
# "uint16", and `levels_of` the values; the hash is of the values.
SCAN = np.dtype(
    [(name, "i8") for name in (*STATUS, "read", "height", "width", "scale", "count")]
    + [("content", "u8"), ("format", "S12"), ("gray", "?"), ("sums", "f8", 4)]
    + [("squares", "f8", 4), ("pixels", "u8"), ("kind", "S8"), ("levels", "f8", 5)]
)

# A file can change again without a new time of change, if that follows within the time that the
# clock of the file system takes to advance: 2 s on FAT.
CLOCK = 2 * 10**9  # ns
NEAR = 3  # levels of 255; more than between the means of a sample of noise and of all its pixels
SAMPLED = 64  # pixels of the shorter side that count in the sums at least, if the decoding scales
EMPTY = np.zeros((), SCAN)  # the row of a file that does not decode
LABEL = "looking at the images"
CHUNK = 256  # images that are decoded together
SAVE_EVERY = 60  # seconds; a start that is killed loses no more

# The forms of pictures that are wanted, each with a mask of the files (N) of which it is wanted.
Wanted = list[tuple[Form, np.ndarray]]


def scan(
    root: Path,
    paths: list[Path],
    plan: Callable[[Iterator[tuple[int, int, bool]]], Wanted],
    *,
    verify: bool = False,
    value_range: ValueRange = PER_IMAGE,
    cache_gb: float | None = None,
) -> tuple[np.ndarray, dict[Path, str], list[Pictures]]:
    """Finds broken files, returns the sizes and pixel sums of images, and decodes pictures.

    The results are kept in the user's cache folder. A file is read again only if its status differs
    from the cache, if it was changed less than 2 s before it was read, or if a picture lacks.

    Args:
        root: the folder or CSV file of the dataset. Each dataset has a cache of its own.
        paths: the N image files.
        plan: returns the forms of the pictures to decode, all of one size. The argument yields the
            height, the width and whether it is gray of each image, 0, 0 and False if not known.
        verify: whether to read all files again.
        value_range: how values of more than 8 bits become bytes for the sums.
        cache_gb: how many GB of pictures the cache may contain.

    Returns:
        Three values: an array (N) of the dtype `SCAN`, with a row per path, of zeros for a file
        that does not decode; a dict from each such file to the reason; and the pictures (N) in each
        form, as far as they are in the cache.
    """
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    if value_range != PER_IMAGE:
        name += "_{}_{}".format(*value_range)
    cache = cache_folder() / f"scan_{decode.DECODER}_{name}.npz"
    names = [os.path.abspath(path) for path in paths]
    known, at = _load(cache)
    rows = np.append(known, np.zeros(1, SCAN))[[at.get(name, -1) for name in names]]
    rows[~_is_unchanged(rows, paths)] = EMPTY
    headers = _headers(rows, paths)
    wanted = plan(show_progress(headers, LABEL, len(paths), every_seconds=10))
    least_side = wanted[0][0].least_side
    rows = np.where(rows["scale"] == _scales(rows, least_side), rows, EMPTY)
    common = (cache_gb, set())  # none removes a pack that another one needs
    writers = [PackWriter(form, rows["content"], mask, *common) for form, mask in wanted]
    todo = np.flatnonzero((rows["read"] == 0) | verify | np.any([w.lacks for w in writers], axis=0))
    known = known[known["scale"] == _scales(known, least_side)] if len(todo) else []
    reader = _Reader({row["content"].item(): row for row in known}, value_range, writers)
    try:
        bad = _read_files(reader, paths, todo, rows, partial(_store, cache, names, rows))
    finally:
        pictures = [writer.finish(rows["content"]) for writer in writers]
    return rows, bad, pictures


def _read_files(
    reader: "_Reader", paths: list[Path], todo: np.ndarray, rows: np.ndarray, store: Callable
) -> dict[Path, str]:
    """Reads image files, and hands their pictures to the writers.

    Args:
        reader: reads the files.
        paths: the N image files.
        todo: the indices of the files to read.
        rows: the rows (N), into which those of the files are written.
        store: a function that keeps the rows for later starts.

    Returns:
        A dict from each file that does not decode to the reason.
    """
    bad, saved = {}, time.monotonic()
    results = show_progress(reader.read_all(paths, todo), LABEL, len(todo), every_seconds=10)
    try:
        for number, (row, pictures) in zip(todo.tolist(), results):
            if isinstance(row, str):
                bad[paths[number]], row = row, EMPTY
            rows[number] = row
            for writer, picture in zip(reader.writers, pictures):
                if picture is not None:
                    writer.add(row["content"].item(), picture)
            if time.monotonic() > saved + SAVE_EVERY:
                saved = time.monotonic()
                store()
        return bad
    finally:  # a start that is stopped by a signal loses nothing
        if len(todo):
            store()


def _is_unchanged(rows: np.ndarray, paths: Iterable[Path]) -> np.ndarray:
    """Returns for each file whether its row in the cache is still true, bool (N).

    Args:
        rows: the rows of the cache (N). The row of an unknown file is all zeros.
        paths: the N files.
    """
    now = np.array([_status(path) for path in paths], "i8").reshape(-1, len(STATUS))
    same = np.all([rows[name] == now[:, at] for at, name in enumerate(STATUS)], axis=0)
    return same & (rows["read"] - np.maximum(rows["changed"], rows["entry_changed"]) > CLOCK)


def _status(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (-1,) * len(STATUS)
    # Network file systems have numbers of files that are too large for an i8.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63


@dataclass
class _Reader:
    """A function that reads image files.

    Attributes:
        known: the rows of an earlier scan, by the hash of the file. A file with the same bytes is
            not decoded again, unless pictures lack.
        value_range: how values of more than 8 bits become bytes for the sums.
        writers: for each form of pictures, the writer, which knows what pictures lack.
    """

    known: dict[int, np.ndarray]
    value_range: ValueRange
    writers: list[PackWriter]

    def read_all(self, paths: list[Path], todo: np.ndarray) -> Iterator[tuple]:
        """Yields what `read` returns for some of the files, which are read in several threads.

        Args:
            paths: the N image files.
            todo: the indices of the files to read.
        """
        with ThreadPoolExecutor(usable_cpus()) as pool:
            for start in range(0, len(todo), CHUNK):  # pictures of CHUNK files wait in memory
                numbers = todo[start : start + CHUNK].tolist()
                yield from pool.map(self.read, (paths[number] for number in numbers), numbers)

    def read(self, path: Path, number: int) -> tuple[np.ndarray | str, list[torch.Tensor | None]]:
        """Reads an image file.

        Args:
            path: the image file.
            number: the index of the file.

        Returns:
            Two values. The first value is a row of the dtype `SCAN` of this module. If the file
            does not decode, the first value is a text with the reason. The second value is the
            picture for each writer, uint8 (C, H, W), or None if the writer needs none. The list
            is empty if the file does not decode.
        """
        try:
            read, status = time.time_ns(), _status(path)
            if not stat.S_ISREG(os.stat(path).st_mode):
                return "not a regular file", []
            file = io.BytesIO(path.read_bytes())
            content = content_hash(file)
            row = self.known.get(content)
            forms = [w.form if w.needs(number, content) else None for w in self.writers]
            if row is None or any(forms):
                image = decode.open_image(file, self.writers[0].form.least_side)
                rgb = decode.to_array(image, 3, self.value_range)
            if row is None:
                row = _look_at(image, rgb, self.writers[0].form.least_side)
            pictures = [form and _picture(image, rgb, form) for form in forms]
        except OSError as error:
            return error.strerror or str(error), []
        except BadImage as bad:
            return str(bad), []
        row = row.copy()
        for name, value in zip(STATUS, status):
            row[name] = value
        row["read"], row["content"] = read, content
        return row, pictures


def _picture(image: Image.Image, rgb: np.ndarray, form: Form) -> torch.Tensor | None:
    """Returns the picture of an image in a form, or None if the range of values is not known yet.

    Args:
        image: the image, as `open_image` returns it.
        rgb: the pixels of the image, uint8 (3, H, W).
        form: the form of the picture.
    """
    is_deep = decode.deep_values(image) is not None
    if is_deep and form.value_range is None:
        return None
    if is_deep or form.channels == 1:
        rgb = decode.to_array(image, form.channels, form.value_range)
    return form.apply(torch.from_numpy(rgb))


def _look_at(image: Image.Image, rgb: np.ndarray, least_side: int | None) -> np.ndarray:
    """Returns a row of the dtype `SCAN` without the facts about the file.

    If JPEG files are decoded at a smaller scale, not all pixels of a large image count in the sums.

    Args:
        image: the image, as `open_image` returns it.
        rgb: the pixels of the image, uint8 (3, H, W).
        least_side: the pixels that the shorter side needs at least, or None for all pixels.
    """
    row = np.zeros((), SCAN)
    row["width"], row["height"] = image.full_size
    row["gray"], row["format"] = image.mode in decode.GRAY_MODES, image.format
    row["scale"] = _scales(row, least_side)
    step = 1 if least_side is None else max(1, min(rgb.shape[1:]) // SAMPLED)
    sample = np.ascontiguousarray(rgb[:, ::step, ::step])
    colors = Image.fromarray(sample.transpose(1, 2, 0).copy())
    gray = colors.convert("L")
    sample = np.concatenate([sample, np.asarray(gray)[None]])
    counts = np.reshape(colors.histogram() + gray.histogram(), (4, 256))
    values = np.arange(256.0)
    row["count"], row["sums"] = gray.width * gray.height, counts @ values
    row["squares"] = counts @ values**2
    values = decode.deep_values(image)
    if values is not None:
        row["kind"], sample = values.dtype.name, values.astype(np.float64) + 0.0  # no -0.0
        row["levels"] = levels_of(sample)
    row["pixels"] = array_hash(sample)
    if least_side is not None and values is None:  # faster than a hash of all pixels
        row["pixels"] ^= np.uint64(zlib.crc32(np.ascontiguousarray(rgb.transpose(1, 2, 0))) << 32)
    return row


def _scales(rows: np.ndarray, least_side: int | None) -> np.ndarray:
    """Returns by how much the decoding of each image is scaled, 0 if all pixels count (N)."""
    if least_side is None:
        return np.zeros(rows.shape, np.int64)
    scales = decode.scale_of(np.minimum(rows["height"], rows["width"]), least_side)
    return np.where(np.isin(rows["format"], (b"JPEG", b"MPO")), scales, 1)


def _headers(rows: np.ndarray, paths: list[Path]) -> Iterator[tuple[int, int, bool]]:
    """Yields the height and the width of each image, and whether the image is gray.

    Args:
        rows: the rows of the cache (N). The rows of unknown files, which are opened, are all zeros.
        paths: the N files.
    """
    for row, path in zip(rows[["height", "width", "gray", "read"]].tolist(), paths):
        yield row[:3] if row[3] else decode.read_header(path)


def match_scaled(rows: np.ndarray, paths: list[Path]) -> None:
    """Gives images of equal pixels one hash, though not all were decoded at the same scale.

    A JPEG file that was decoded at a smaller scale has other pixels than a lossless copy. So the
    file is decoded in full if another image has the same size and nearly the same mean colors.

    Args:
        rows: the rows of the files, of the dtype `SCAN` (N), which are changed in place.
        paths: the files (N).
    """
    means, sizes = rows["sums"] / rows["count"][:, None], rows["height"] << 32 | rows["width"]
    # In order of size and gray, so that only neighbors are compared.
    key = np.unique(sizes, return_inverse=True)[1] * 1000 + means[:, 3]
    whole = np.flatnonzero(rows["scale"] == 1)
    whole = whole[np.argsort(key[whole])]
    first, end = (np.searchsorted(key[whole], key + by) for by in (-NEAR, NEAR))
    for number in np.flatnonzero((rows["scale"] > 1) & (first < end)).tolist():
        some = whole[first[number] : end[number]]
        near = some[(np.abs(means[some] - means[number]) < NEAR).all(axis=1)]
        with contextlib.suppress(BadImage):  # gone a moment ago, which is told when it is needed
            if len(near):
                image = decode.open_image(paths[number])
                pixels = _look_at(image, decode.to_array(image, 3), least_side=1)["pixels"]
                if pixels in rows["pixels"][near]:
                    rows["pixels"][number] = pixels


def _load(cache: Path) -> tuple[np.ndarray, dict[str, int]]:
    """Reads the rows of an earlier scan.

    Returns:
        Two values. The first value is an array of the dtype `SCAN`. The second value is a dict from
        the absolute path of each file to the index of its row.
    """
    # No cache, or a broken one: scan again.
    with contextlib.suppress(Exception), np.load(cache, allow_pickle=False) as file:
        names, rows = os.fsdecode(file["names"].tobytes()).split("\0"), file["rows"]
        if rows.dtype == SCAN and len(names) == len(rows):
            return rows, {name: index for index, name in enumerate(names)}
    return np.zeros(0, SCAN), {}


def _store(cache: Path, names: list[str], rows: np.ndarray) -> None:
    known = np.flatnonzero(rows["read"]).tolist()
    names, rows = [names[number] for number in known], rows[known]
    text = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
    with contextlib.suppress(OSError):  # without the cache, the next start only has to scan again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, names=text, rows=rows))
