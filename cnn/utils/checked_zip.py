"""The file format of a checkpoint: the zip file of torch.save, with a checksum over its headers.

torch.save stores a CRC of every member of the zip file, but torch.load does not check these CRCs,
and they do not cover the bytes outside the members' data: the headers and the directory. Therefore
the comment of the zip file contains a SHA-256 of every byte that is not a member's data. torch.load
and other programs ignore the comment. Reading a file here checks that SHA-256 and the CRCs. A file
that plain torch.save has written has no comment, so only its CRCs are checked.

Before anything is unpickled, the pickle is checked: it may name no Python objects except those that
tensors are made of.
"""

import contextlib
import hashlib
import io
import pickle
import pickletools
import stat
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from cnn.errors import Refused, first_line

MARK = b"sha256 of all that has no CRC: "
# The mark of the first format, whose checksum covers the data of the members too.
FIRST_MARK = b"sha256 of all before, as torch.save wrote it: "
END_MARK = b"PK\x05\x06"
END_BYTES = 22  # the zip file's end record; its last two bytes are the length of the comment
LOCAL_HEADER_BYTES = 30  # its last four bytes are the lengths of the name and of an extra field

# The objects that a pickle of tensors and plain values may name.
NUMBERS = "Float Double Half BFloat16 ComplexFloat ComplexDouble Bool Byte Char Short Int Long"
ALLOWED = {
    "collections OrderedDict",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {number}Storage" for number in NUMBERS.split()),
}
NAMING = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")  # opcodes that name an object


def write_archive(content: Any, file: IO[bytes]) -> None:
    """Saves a value with torch.save, and adds a checksum to the file.

    torch.save stores a checksum for the data of each member of the zip file. The added checksum
    covers all other bytes, such as the headers of the members.

    Args:
        content: any value that torch.save accepts, such as the dict of a checkpoint.
        file: an empty file that is open for writing and reading in binary mode.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch raises it while it handles an OSError
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    with zipfile.ZipFile(file) as archive:
        comment = MARK + _frame_checksum(file, archive, file.seek(0, 2))
    file.seek(-2, 2)
    file.write(len(comment).to_bytes(2, "little") + comment)


def read_archive(path: Path) -> Any:
    """Reads the value that torch.save has written to a file.

    The checksums in the file are checked first. Code in the file is never executed. Tensors are put
    on the CPU.

    Args:
        path: the path of the file.

    Returns:
        The value that was saved.

    Raises:
        Refused: the file cannot be read, is damaged, or contains something that could run code.
    """
    with _open(path) as (file, archive):
        broken = archive.testzip()
        if broken is not None:
            raise Refused(f"{path}: damaged: the checksum of {broken} does not hold")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def read_plain_values(path: Path) -> Any:
    """Reads a value that torch.save has written, without the data of tensors.

    Reading takes milliseconds even for a large file. Damage in the data of the tensors is not
    noticed.

    Args:
        path: the path of the file.

    Returns:
        The value that was saved, with None in place of every tensor.

    Raises:
        Refused: the file cannot be read, is damaged, or contains something that could run code.
    """
    with _open(path) as (_, archive):
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _TensorsAsNone(io.BytesIO(archive.read(name))).load()


class _TensorsAsNone(pickle.Unpickler):
    """An unpickler that puts None in place of every tensor and imports nothing.

    The pickle must have been checked with the function `_check_pickle` before.
    """

    def find_class(self, _: str, name: str) -> Any:
        return {"OrderedDict": OrderedDict, "Size": tuple}.get(name, lambda *_: None)

    def persistent_load(self, _: Any) -> None:
        """Returns None in place of the storage of a tensor."""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """Opens a file of torch.save during a `with` block.

    The headers and the pickle in the file are checked before the block begins. The data of the
    tensors is not checked. If another program replaces the file, the block still reads the old
    file.

    Args:
        path: the path of the file.

    Yields:
        The open file and the zip archive in the file.

    Raises:
        Refused: the file cannot be read, is damaged, or contains something that could run code. Any
            other exception in the block is replaced by Refused.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device might never end
            raise Refused(f"{path}: expected a checkpoint file, got a folder, pipe or device")
        if status.st_size == 0:
            raise Refused(f"{path}: the file is empty")
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise Refused(f"{path}: not a checkpoint: the file does not begin as one of those")
            with zipfile.ZipFile(file) as archive:
                _check_frame(path, file, archive)
                _check_members(path, archive, file.seek(0, 2))
                yield file, archive
    except Refused:
        raise
    except FileNotFoundError:
        raise Refused(f"{path}: no such file") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise Refused(f"{path}: damaged: the file is cut off or changed: {error}") from None
    except pickle.UnpicklingError:  # torch's message advises to load it anyway
        raise Refused(f"{path}: not opened: it does not read as tensors and plain values") from None
    except Exception as error:  # noqa: BLE001  zipfile and torch raise many kinds for a strange file
        reason = first_line(error).rstrip(".")
        raise Refused(f"{path}: damaged, or not a file of torch.save: {reason}") from None


def _check_frame(path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """Checks the end of a zip file, and the checksum in the file's comment.

    A file without a comment has no checksum, and is accepted.

    Args:
        path: the path of the file, for the error message.
        file: the open file.
        archive: the zip archive in the file.

    Raises:
        zipfile.BadZipFile: the end of the file does not belong to an intact zip file.
        Refused: the checksum is wrong.
    """
    comment = archive.comment
    size = file.seek(0, 2) - len(comment)
    file.seek(size - END_BYTES)
    end = file.read(END_BYTES)
    if not end.startswith(END_MARK) or end[-2:] != len(comment).to_bytes(2, "little"):
        raise zipfile.BadZipFile("the end record does not fit the end of the file")
    if comment.startswith(FIRST_MARK):
        expected = FIRST_MARK + _checksum(file, [(0, size - 2)])
    else:
        expected = MARK + _frame_checksum(file, archive, size)
    if comment not in (b"", expected):
        raise Refused(f"{path}: damaged: the checksum over the file does not hold")


def _frame_checksum(file: IO[bytes], archive: zipfile.ZipFile, size: int) -> bytes:
    """Computes the SHA-256 of a zip file without the data of the members.

    The comment at the end of the file is left out, because the comment contains the checksum.

    Args:
        file: the open file.
        archive: the zip archive in the file.
        size: the size of the file without the comment, in bytes.

    Returns:
        The checksum in hexadecimal digits.
    """
    spans, position = [], 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        lengths = struct.unpack("<HH", file.read(LOCAL_HEADER_BYTES)[-4:])
        start = member.header_offset + LOCAL_HEADER_BYTES + sum(lengths)
        spans.append((position, start))
        position = start + member.compress_size
    return _checksum(file, [*spans, (position, size - 2)])


def _checksum(file: IO[bytes], spans: list[tuple[int, int]]) -> bytes:
    """Computes one SHA-256 of several spans of a file and two zero bytes.

    The zero bytes follow the last span. The zero bytes stand for the length of an empty comment at
    the end of a zip file.

    Args:
        file: the open file.
        spans: the start and the end of each span, as byte offsets. The byte at the end is not part
            of the span.

    Returns:
        The checksum in hexadecimal digits.
    """
    sha256 = hashlib.sha256()
    for start, end in spans:
        file.seek(start)
        sha256.update(file.read(max(end - start, 0)))
    sha256.update(b"\0\0")
    return sha256.hexdigest().encode()


def _check_members(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Checks the names, flags, sizes and pickles of the members of a zip file.

    Args:
        path: the path of the file, for the error message.
        archive: the zip archive in the file.
        size: the size of the whole file in bytes.

    Raises:
        Refused: a member is compressed, encrypted, marked as a folder, or contains a pickle that
            could run code. Refused is also raised if two members have the same name, or if the
            members claim more bytes than the file has.
    """
    members = archive.infolist()
    names = [member.filename for member in members]
    if len({name.lower() for name in names}) < len(names):
        raise Refused(f"{path}: not a file of torch.save: a member twice")
    for member in members:
        if member.external_attr & 0x10:  # torch would take it for a folder, and read nothing
            raise Refused(f"{path}: damaged: {member.filename!r} is marked as a folder")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused(f"{path}: not a file of torch.save: {member.filename!r} is compressed")
    if sum(max(member.file_size, member.compress_size) for member in members) > size:
        raise Refused(f"{path}: not a file of torch.save: it claims more than it holds")
    for name in names:
        if name.lower().endswith("pkl"):
            _check_pickle(path, archive.read(name))


def _check_pickle(path: Path, pickled: bytes) -> None:
    """Checks that a pickle can be read without risk.

    The pickle may name only the few Python classes and functions that tensors and plain values
    need.

    Args:
        path: the path of the file with the pickle, for the error message.
        pickled: the bytes of the pickle.

    Raises:
        Refused: the pickle names another class or function, which could run code. Refused is also
            raised if a number in the pickle is so large that reading could fill the memory.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in NAMING and argument not in ALLOWED:
            named = str(argument or opcode.name).replace(" ", ".")
            fault = f"holds a Python object that a checkpoint has no use for ({named})"
            raise Refused(f"{path}: {fault}; not opened, since such a file can run code")
        if opcode.name == "LONG4" or ("PUT" in opcode.name and argument > len(pickled)):
            raise Refused(f"{path}: damaged: its pickle has numbers that are too large")
