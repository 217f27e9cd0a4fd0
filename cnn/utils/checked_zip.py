"""The file under a checkpoint: torch.save's zip file, and a checksum over the rest of it at its end.

torch writes a checksum (CRC) of every member and does not look at it when it reads; no checksum
covers what lies between the members, headers and directory. So a SHA-256 of all that is no member's
data stands in the zip file's comment, where torch.load, unzip and the like pass it by; the CRCs, on
which it depends, cover the data. A file without one, saved by hand with torch.save, is held against
the CRCs alone.

Nothing of a file is used before it is found whole and plain: members as large as they say, and no
Python object among the values but those that tensors are made of.
"""

import hashlib
import pickle
import pickletools
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from cnn.errors import Refused

MARK = b"sha256 of all that has no CRC: "
FIRST_MARK = b"sha256 of all before, as torch.save wrote it: "  # of the first format, data included
END = b"PK\x05\x06"  # of a zip file; 22 bytes, the last two the length of the comment
END_BYTES = 22
TAIL_BYTES = END_BYTES + 200  # the end and the longest comment of ours
# Then come the member's name and an extra field, whose lengths are the last four.
LOCAL_HEADER_BYTES = 30

# What a tree of tensors and plain values is pickled with.
STORAGES = (
    *("Float", "Double", "Half", "BFloat16", "ComplexFloat", "ComplexDouble"),
    *("Bool", "Byte", "Char", "Short", "Int", "Long"),
)
PLAIN = {
    *("collections OrderedDict", "torch Size"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(f"torch {kind}Storage" for kind in STORAGES),
}
NAMING = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")  # opcodes that name an object


class _Watched:
    """Passes on what is written, and remembers how the disk failed: torch wraps it past recognition."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_archive(content: Any, file: IO[bytes]) -> None:
    """Writes torch.save's file, then the checksum.

    Args:
        file: opened for writing and reading.

    Raises:
        OSError: as the disk said it.
    """
    watched = _Watched(file)
    try:
        torch.save(content, watched)
    except Exception as error:  # noqa: BLE001  torch has several for a disk that fails
        raise (watched.failure or error) from None
    comment = MARK + _frame_checksum(file, file.tell())
    file.seek(-2, 2)
    file.write(len(comment).to_bytes(2, "little") + comment)


def read_archive(path: Path) -> Any:
    """Reads a file of torch.save to the CPU, every byte checked, nothing in it executed.

    Raises:
        Refused: the file cannot be read, is damaged, or holds what could run code.
    """
    return read_archive_and_size(path)[0]


def read_archive_and_size(path: Path) -> tuple[Any, int]:
    """As `read_archive`, with the bytes that the file has.

    Another file may be put in its place meanwhile: what comes is all of one of them.

    Raises:
        Refused: the file cannot be read, is damaged, or holds what could run code.
    """
    try:
        with _open(path) as file:
            _check_whole(path, file)
            _check_members(path, file)
            size = file.seek(0, 2)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True), size
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # torch's words would advise to load it all the same
        raise Refused(f"{path}: not opened: it does not read as tensors and plain values") from None
    except Exception as error:  # noqa: BLE001  whatever a strange file makes zipfile and torch say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(
            f"{path}: damaged, or not a file of torch.save: {reason.rstrip('.')}"
        ) from None


def _open(path: Path) -> IO[bytes]:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None
    if not stat.S_ISREG(mode):  # a pipe or a device might never end
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or the like"
        raise Refused(f"{path}: expected a checkpoint file, got {what}")
    return open(path, "rb")


def _check_whole(path: Path, file: IO[bytes]) -> None:
    """Holds the file against the checksum in its comment."""
    start, size = file.read(4), file.seek(0, 2)
    if size == 0:
        raise Refused(f"{path}: the file is empty")
    if not start.startswith(b"PK"):
        raise Refused(
            f"{path}: not a checkpoint: the file does not begin as those of torch.save do"
        )
    file.seek(max(size - TAIL_BYTES, 0))
    tail = file.read()
    end = tail.rfind(END)
    comment = tail[end + END_BYTES :]
    length = tail[end + END_BYTES - 2 : end + END_BYTES]
    if end < 0 or len(length) < 2 or int.from_bytes(length, "little") != len(comment):
        raise Refused(f"{path}: damaged: the file is cut off, or its end is changed")
    left = size - len(comment)
    if comment and comment not in (
        MARK + _frame_checksum(file, left),
        FIRST_MARK + _checksum(file, [(0, left)]),
    ):
        raise Refused(f"{path}: damaged: the checksum over the file does not hold")


def _frame_checksum(file: IO[bytes], size: int) -> bytes:
    """Of the zip file's first `size` bytes, its comment left out, all that is not a member's data."""
    spans, position = [], 0
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
            file.seek(member.header_offset)
            lengths = file.read(LOCAL_HEADER_BYTES)[-4:]
            names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            start = member.header_offset + LOCAL_HEADER_BYTES + names
            spans.append((position, start))
            position = start + member.compress_size
    return _checksum(file, [*spans, (position, size)])


def _checksum(file: IO[bytes], spans: list[tuple[int, int]]) -> bytes:
    """SHA-256 of these spans of the file, the last of which ends with the length of its comment.

    That counts as 0, which it was before there was a comment.
    """
    sha256 = hashlib.sha256()
    for number, (start, end) in enumerate(spans, 1):
        file.seek(start)
        left = end - start - (2 if number == len(spans) else 0)
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha256.update(block)
            left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest().encode()


def _check_members(path: Path, file: IO[bytes]) -> None:
    """Holds the members against their own checksums and sizes, and what they would unpickle."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len({name.lower() for name in names}) < len(names):
            raise Refused(f"{path}: not a file of torch.save: a member twice")
        for member in members:
            if member.external_attr & 0x10:  # which torch would take for a folder, and read nothing
                raise Refused(f"{path}: damaged: {member.filename!r} is marked as a folder")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise Refused(
                    f"{path}: not a file of torch.save: {member.filename!r} is compressed"
                )
        if sum(max(member.file_size, member.compress_size) for member in members) > size:
            raise Refused(f"{path}: not a file of torch.save: it claims more than it holds")
        broken = archive.testzip()
        if broken is not None:
            raise Refused(f"{path}: damaged: the checksum of {broken} does not hold")
        for name in names:
            if name.lower().endswith("pkl"):
                _check_pickle(path, archive.read(name))


def _check_pickle(path: Path, pickled: bytes) -> None:
    """Refuses all that a tree of tensors and plain values is not made of, and says what."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in NAMING and argument not in PLAIN:
            raise Refused(
                f"{path}: holds a Python object that a checkpoint has no use for"
                f" ({str(argument or opcode.name).replace(' ', '.')}); not opened, since such a file"
                f" can run code"
            )
