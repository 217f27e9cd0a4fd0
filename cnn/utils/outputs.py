"""Files that the user names for the results of a script: checked before the work, then written."""

import mmap
import os
import re
from collections.abc import Iterable
from pathlib import Path

from cnn.errors import Refused
from cnn.utils.files import raising_failed, write_atomically

# A kind of file that a script writes, recognized by the content: a regular expression for the
# beginning of the file, and bytes that are somewhere in every file of this kind and in no other.
Kind = tuple[bytes, bytes]

# The beginnings of files, for the message about a file that is not replaced.
FORMATS = {b"\x89PNG": "a PNG image", b"\xff\xd8": "a JPEG image", b"PK": "a checkpoint or archive"}


def check_output(option: str, path: Path, kind: Kind, others: Iterable[Path | None] = ()) -> None:
    """Checks that a script may write an output file.

    A script calls this function before the long work that produces the file. A file that exists may
    be replaced only if the same option has written the file, or if the file is empty.

    Args:
        option: the option that gives the path, such as "--csv". An error message begins with the
            option.
        path: the path of the file, or of a link to the file.
        kind: the kind of file that the option writes.
        others: the inputs and the other outputs of the script; None is ignored.

    Raises:
        Refused: the path is in a folder that does not exist, or is itself a folder or a device. Or
            the path is one of `others`, is read-only, or is a file of another kind.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise Refused(f"{option}: expected a file in a folder that exists, got {path}")
    if any(other is not None and target == Path(os.path.realpath(other)) for other in others):
        raise Refused(f"{option}: expected a file of its own, got {path}, used here already")
    if not target.exists():
        return
    if not target.is_file():
        raise Refused(f"{option}: expected a file, got {path}, which is a folder or a device")
    with raising_failed(path):
        reason = _reason_to_keep(target, kind)
    if reason:
        raise Refused(f"{option}: {path} is not replaced: {reason}; give the output another name")


def _reason_to_keep(path: Path, kind: Kind) -> str:
    if not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK):
        return "it is read-only"
    if not path.stat().st_size:
        return ""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if re.match(kind[0], data) and data.find(kind[1]) >= 0:
            return ""
        line = data[:40].decode("utf-8", "replace").split("\n")[0]
        kinds = [name for start, name in FORMATS.items() if data[: len(start)] == start]
    return f"it is {kinds[0] if kinds else f'another file, which begins with {line!r}'}"


def write_output(path: Path, data: bytes) -> None:
    """Replaces or creates a file that the user has asked for.

    If the path is a link, the file that the link leads to is written.

    Args:
        path: the path of the file, such as a table or an exported model.
        data: the new content of the file.

    Raises:
        Failed: the file cannot be written. The message contains the path.
    """
    with raising_failed(path):
        write_atomically(Path(os.path.realpath(path)), lambda file: file.write(data))
