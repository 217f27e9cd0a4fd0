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
    """Replaces or creates a file, and never leaves a half-written file.

    After a crash, the file has either the old or the new content. The content is first written to a
    temporary file in the same folder.

    Args:
        path: the file to replace or create.
        write: a function that writes the content. The argument of the function is a temporary file,
            open for writing and reading in binary mode.
        also: further paths in the same folder for the same content. The further paths are replaced
            before `path`.

    Raises:
        OSError: a file cannot be written, renamed or synced to disk. Each path then has either the
            old or the new content. No temporary file is left.
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


@contextlib.contextmanager
def raising_failed(path: Path) -> Iterator[None]:
    """Raises Failed in place of an OSError from the `with` block.

    Args:
        path: the file that the block writes, for the error message.

    Raises:
        Failed: an OSError occurred in the block. The message contains the path.
    """
    try:
        yield
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text to a file in UTF-8, in place of any earlier content.

    After a crash, the file has either the old or the new content. A lone surrogate, which UTF-8
    cannot encode, is written as an escape sequence.

    Args:
        path: the path of the file.
        text: the new content of the file.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_record(path: Path, text: str) -> None:
    """Writes a text to a file, in place of any earlier content.

    If the file cannot be written, a warning is logged and no error is raised.

    Args:
        path: the path of a file in the log folder of a run.
        text: the new content of the file.
    """
    try:
        write_text(path, text)
    except OSError as error:
        warn_unwritten(path, error.strerror or str(error))


def warn_unwritten(what: Path | str, reason: str) -> None:
    """Logs a warning that a file in a run's log folder cannot be written.

    Args:
        what: the path of the file, or a name for several files, such as "logs/tensorboard".
        reason: the reason for the failure, such as "No space left on device".
    """
    effect = "training goes on, and no checkpoint lacks anything"
    logger.warning("%s: cannot be written: %s; %s", what, reason, effect)


def temporary_name(path: Path) -> Path:
    """Returns a unique path for a temporary file beside another file.

    Args:
        path: the file that the temporary file will replace.
    """
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


def remove_leftovers(folder: Path) -> None:
    """Removes this project's temporary files, which a crash can leave, from a folder.

    If a file cannot be removed, the function stops without an error.
    """
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates a folder and all missing parent folders, and syncs the change to disk.

    A folder that exists is left unchanged.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk.

    A later power failure then does not undo renames in the folder. On Windows, where folders cannot
    be synced, the function does nothing.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
