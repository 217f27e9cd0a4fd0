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

TEMPORARY = ".cnn.tmp"  # suffix of temporary files; the user's .tmp files have another one


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], None], also: tuple[Path, ...] = ()
) -> None:
    """Replaces a file so that, even after a crash, it has either its old content or the new one.

    The content is written to a temporary file in the same folder, synced to disk, and renamed.

    Args:
        path: the file to replace or create.
        write: a function that is called with the temporary file and writes the content to it. The
            file is open for writing and reading in binary mode.
        also: further paths in the same folder that get the same content. They are replaced and
            synced to disk before `path` is replaced.

    Raises:
        OSError: a write, rename or sync failed. No temporary file is left. `path` has its old
            content, or the new one if the error came from syncing the folder after `path` was
            replaced. Each path in `also` has its old content or the new one.
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
    """Replaces or creates a file that the user has asked for, such as a table or an export.

    Args:
        path: the path of the file.
        data: the new content of the file.

    Raises:
        Failed: the file cannot be written. The message contains its path.
    """
    with raising_failed(path):
        write_atomically(path, lambda file: file.write(data))


@contextlib.contextmanager
def raising_failed(path: Path) -> Iterator[None]:
    """Raises Failed in place of an OSError that occurs in the `with` block.

    Args:
        path: the file that the block writes, for the error message.

    Raises:
        Failed: an OSError occurred. The message contains the path.
    """
    try:
        yield
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text to a file in UTF-8, in place of the file's earlier content.

    After a crash, the file has either its old content or the new one. A lone surrogate, which UTF-8
    cannot encode, is written as its escape sequence.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_record(path: Path, text: str) -> None:
    """Writes a text to a file in the log folder of a run, in place of the file's earlier content.

    If the file cannot be written, a warning is logged and no error is raised.
    """
    try:
        write_text(path, text)
    except OSError as error:
        warn_unwritten(path, error.strerror or str(error))


def warn_unwritten(what: Path | str, reason: str) -> None:
    """Logs a warning that a file in the log folder of a run cannot be written.

    Args:
        what: the path of the file, or a name for several files, such as "logs/tensorboard".
        reason: why it cannot be written, such as "No space left on device".
    """
    effect = "training goes on, and no checkpoint lacks anything"
    logger.warning("%s: cannot be written: %s; %s", what, reason, effect)


def temporary_name(path: Path) -> Path:
    """Returns a unique path for a temporary file in the folder of another file.

    Args:
        path: the file that the temporary file will replace.
    """
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a crash has left in a folder.

    Only temporary files of this project are removed. If one of them cannot be removed, the function
    stops without an error, and the remaining ones stay.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and syncs them to disk.

    A folder that exists is left as it is.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk, so that a power failure does not undo renames in it.

    On Windows, which cannot sync folders, it does nothing.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
