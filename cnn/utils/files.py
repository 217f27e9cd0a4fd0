"""Durable writes: after a crash or a power failure, a file has its old content or its new one."""

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

TEMPORARY = ".cnn.tmp"  # suffix of our unfinished files; the user's own .tmp files are left alone


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], None], also: tuple[Path, ...] = ()
) -> None:
    """Writes a temporary file in the same folder, syncs it, and renames it to `path`.

    Args:
        path: the file to replace.
        write: writes the content to the temporary file, which is open for writing and reading.
        also: further names in the same folder for the same content; they are durably in place
            before `path` is, so that the content of `path` may refer to them.

    Raises:
        OSError: `path` is unchanged, and no temporary file is left; each further name has either
            its old content or the new one.
    """
    temporary = temporary_name(path)
    links = [temporary_name(other) for other in also]
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for other, link in zip(also, links, strict=True):
            try:
                os.link(temporary, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(temporary, link)
                with open(link, "r+b") as copy:
                    os.fsync(copy.fileno())
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
    """Writes a file that the user asked for.

    Raises:
        Failed: the file cannot be written.
    """
    with raising_failed(path):
        write_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def raising_failed(path: Path) -> Iterator[None]:
    """Raises Failed, with the file's name, for an OSError within the context."""
    try:
        yield
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Replaces a file by a text in UTF-8; a lone surrogate is written as its escape sequence."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_record(path: Path, text: str) -> None:
    """Writes a record of the run; logs a warning where that fails."""
    try:
        write_text(path, text)
    except OSError as error:
        warn_unwritten(path, error.strerror or str(error))


def warn_unwritten(what: Path | str, reason: str) -> None:
    """Logs that a record of the run cannot be written."""
    effect = "training goes on, and no checkpoint lacks anything"
    logger.warning("%s: cannot be written: %s; %s", what, reason, effect)


def temporary_name(path: Path) -> Path:
    """Returns a unique name for a temporary file in the same folder."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a crash has left in a folder, where permissions allow it."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable; does nothing on Windows, which cannot sync folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
