"""A disk that forgets what was not synced, and a power cut after any one of its operations.

The model is the one that SQLite and LevelDB test with. What is known to survive: a file's bytes as
of its last fsync, a name in a folder as of the folder's last fsync. What came after may have
happened or not, each for itself: names in any combination; bytes whole, a part, or none.
"""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from typing_extensions import Self

from cnn.utils import files


class PowerCut(BaseException):
    """The machine is off."""


class TornDisk:
    """Watches what `cnn.utils.files` does in one folder.

    Args:
        operations: after which the power goes; None lets all pass.
    """

    def __init__(self, folder: Path, operations: int | None = None):
        self.done, self.operations = 0, operations
        self.content: list[bytes] = []  # by number of the file, also of those without a name
        self.synced: list[bool] = []
        self.names: dict[str, int] = {}  # as they are
        self.durable: dict[str, int] = {}  # as they are after a power cut at the latest
        self.changes: list[dict[str, int | None]] = []  # of names, since the folder's last fsync
        self.opened: dict[int, int] = {}  # descriptor: number of the file
        for path in folder.iterdir():
            if path.is_file():
                self.durable[path.name] = self.names[path.name] = self.new(path.read_bytes(), True)

    def new(self, content: bytes = b"", synced: bool = False) -> int:
        self.content.append(content)
        self.synced.append(synced)
        return len(self.content) - 1

    def rename(self, change: dict[str, int | None]) -> None:
        """Names that change together or not at all."""
        self.changes.append(change)
        _apply(self.names, change)
        self.count()

    def write(self, number: int, data: bytes) -> None:
        self.content[number] += data
        self.synced[number] = False
        self.count()

    def sync(self, descriptor: int) -> None:
        if descriptor in self.opened:
            self.synced[self.opened[descriptor]] = True
        else:  # the folder
            self.durable, self.changes = dict(self.names), []
        self.count()

    def count(self) -> None:
        self.done += 1
        self.check()

    def check(self) -> None:
        """Nothing happens when the power is off."""
        if self.done == self.operations:
            raise PowerCut

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts itself between `cnn.utils.files` and the system."""
        unlink = Path.unlink

        def watched_unlink(path: Path, missing_ok: bool = False) -> None:
            self.check()
            existed = path.name in self.names
            unlink(path, missing_ok)
            if existed:
                self.rename({path.name: None})

        patch.setattr(files, "os", _System(self))
        patch.setattr(files, "open", lambda path, mode: _File(self, path, mode), raising=False)
        patch.setattr(Path, "unlink", watched_unlink)

    def states(self, limit: int) -> Iterator[dict[str, bytes]]:
        """What may be found in the folder when the power is back, each as name: bytes."""
        subsets = list(itertools.product((True, False), repeat=len(self.changes)))
        if len(subsets) > limit:
            subsets = [subsets[0], subsets[-1], *random.Random(0).sample(subsets, limit - 2)]
        found = set()
        for subset, share in itertools.product(subsets, (0.0, 0.6, 1.0)):
            names = dict(self.durable)
            for happened, change in zip(subset, self.changes):
                if happened:
                    _apply(names, change)
            state = {name: self._after(number, share) for name, number in names.items()}
            if (key := tuple(sorted(state.items()))) not in found:
                found.add(key)
                yield state

    def _after(self, number: int, share: float) -> bytes:
        content = self.content[number]
        return content if self.synced[number] else content[: int(share * len(content))]


class _File:
    """A file whose every write is an operation."""

    def __init__(self, disk: TornDisk, path: Path, mode: str):
        disk.check()
        self.disk = disk
        self.file: IO[bytes] = open(path, mode, buffering=0)  # noqa: SIM115
        if "w" in mode:
            self.number = disk.new()
            disk.opened[self.file.fileno()] = self.number
            try:
                disk.rename({Path(path).name: self.number})
            except PowerCut:
                self.file.close()
                raise

    def write(self, data: bytes) -> int:
        self.disk.check()
        if self.file.tell() < len(self.disk.content[self.number]):  # the zip comment's length
            content = self.disk.content[self.number]
            self.disk.content[self.number] = content[: self.file.tell()]
        written = self.file.write(data)
        self.disk.write(self.number, bytes(data))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.opened.pop(self.file.fileno(), None)
        self.file.close()


class _System:
    """os, with what changes the disk watched."""

    def __init__(self, disk: TornDisk):
        self.disk = disk

    def fsync(self, descriptor: int) -> None:
        self.disk.check()
        self.disk.sync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        self.disk.check()
        os.link(source, target)
        self.disk.rename({Path(target).name: self.disk.names[Path(source).name]})

    def replace(self, source: Path, target: Path) -> None:
        self.disk.check()
        os.replace(source, target)
        number = self.disk.names[Path(source).name]
        self.disk.rename({Path(target).name: number, Path(source).name: None})

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _apply(names: dict[str, int], change: dict[str, int | None]) -> None:
    for name, number in change.items():
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number
