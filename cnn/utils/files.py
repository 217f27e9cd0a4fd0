"""Files that are either the old one or the new one, whenever the power fails."""

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cnn.errors import Failed

logger = logging.getLogger(__name__)

TEMPORARY = ".cnn.tmp"  # how our files end that are not yet whole; another's .tmp is left alone


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], None], also: tuple[Path, ...] = ()
) -> None:
    """Writes beside the file, syncs, renames over it, syncs the folder.

    Args:
        path: the file to replace.
        write: is given the temporary file, open for writing and reading.
        also: further names in the same folder for the same content; they are durably in place
            before `path` is, so that `path` may speak of them.

    Raises:
        OSError: `path` is as it was, and nothing is left over; each further name has either the old
            content or the new one.
    """
    temporary = temporary_name(path)
    links = [temporary_name(other) for other in also]
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for other, link in zip(also, links):
            try:
                os.link(temporary, link)
            except OSError:  # a file system without hard links
                _copy(temporary, link)
            os.replace(link, other)
        if also:
            sync_folder(path.parent)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        for leftover in (temporary, *links):
            with contextlib.suppress(OSError):
                leftover.unlink()
        raise


def write_output(path: Path, data: bytes) -> None:
    """Writes what the user asked for.

    Raises:
        Failed: as the system says it.
    """
    with raising_failed(path):
        write_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def raising_failed(path: Path) -> Iterator[None]:
    """Has what the system says while a file is written raise Failed, with its name."""
    try:
        yield
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Replaces the file by this text, UTF-8, durably; what is no character becomes its code."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_record(path: Path, text: str) -> None:
    """Replaces a file that tells of the run; where that fails, says so, and training goes on."""
    try:
        write_text(path, text)
    except OSError as error:
        warn_unwritten(path, error.strerror or str(error))


def warn_unwritten(what: Path | str, reason: str) -> None:
    """Says that something that tells of the run is missing, and that this stops nothing."""
    goes_on = "training goes on, and no checkpoint lacks anything"
    logger.warning("%s: cannot be written: %s; %s", what, reason, goes_on)


def temporary_name(path: Path) -> Path:
    """A name beside the file that no other file has, nor another process takes."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


def remove_leftovers(folder: Path) -> None:
    """Removes what a crash in the middle of a write has left in the folder, where it may."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder durable; where folders cannot be opened (Windows), nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())
