"""The folders of a run: their file names, the lock of their writer, the archive of earlier runs."""

import contextlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Self

from cnn.errors import Refused, Stopped
from cnn.utils.files import make_folder, remove_leftovers, sync_folder, write_text

# The names of checkpoints as patterns, in the order in which --resume tries them.
CHECKPOINTS = ("last", "best", "epoch_*")
# The suffixes of the files that export.py writes.
EXPORTS = {"torch": ".pt2", "onnx": ".onnx", "weights": "_weights.pt"}
LAST = "last.pth"

OWNER, LOCK = ".run.json", ".run.lock"
ARCHIVE = "archive"
UNFINISHED = ".unfinished"  # in checkpoints/archive/, while files are moved: the target's name
PATIENCE = 10.0  # seconds; loader processes notice within 5 that their run was killed

logger = logging.getLogger(__name__)


class RunLogs:
    """The files of a run in logs/[NAME/]."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "train.log"
        self.history = folder / "history.csv"
        self.config = folder / "config.yaml"
        self.model = folder / "model.txt"
        self.result = folder / "result.json"
        self.val_predictions = folder / "predictions_val.csv"
        self.report = folder / "report.html"
        self.curves = folder / "curves.png"
        self.confusion_matrix = folder / "confusion_matrix.png"
        self.tensorboard = folder / "tensorboard"

    def paths(self) -> list[Path]:
        """Returns all of them, so that no other files are moved to an archive."""
        return [path for path in vars(self).values() if path != self.folder]


class RunFolder:
    """The folders logs/[NAME/] and checkpoints/[NAME/] below `root`; as a context, locked.

    Args:
        scratch: the folder is removed when the run ends, so that nothing can resume from it.
    """

    def __init__(self, name: str | None, root: Path = Path(), *, scratch: bool = False):
        self.scratch = scratch
        self.logs = RunLogs(root / "logs" / (name or ""))
        self.checkpoints = root / "checkpoints" / (name or "")
        self.last = self.checkpoints / LAST
        self.best = self.checkpoints / "best.pth"
        self.best_hparams = root / "configs" / "best_hparams"  # of all runs
        self._lock: Any = None  # a FileLock
        self._made: list[Path] = []  # folders that this process created

    def __enter__(self) -> Self:
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def lock(self) -> None:
        """Creates the folders and makes this process their only writer.

        Raises:
            Refused: another process is their writer, or they cannot be written.
        """
        try:
            self._make(self.checkpoints)
            self._acquire()
            self._make(self.logs.folder)  # after the lock: nobody else creates or removes it now
            self._put_back()
            owner = {
                "process": os.getpid(),
                "machine": platform.node(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv),
            }
            with contextlib.suppress(OSError):  # the disk may be full; the lock holds without it
                (self.checkpoints / OWNER).write_text(json.dumps(owner), encoding="utf-8")
            for folder in (self.logs.folder, self.checkpoints):
                remove_leftovers(folder)
        except (OSError, Refused) as error:
            self.unlock()
            if isinstance(error, Refused):
                raise
            place = error.filename or self.checkpoints
            raise Refused(f"{place}: cannot be written: {error.strerror}") from None

    def _make(self, folder: Path) -> None:
        """Creates a folder and remembers which of its parents were missing."""
        self._made += [f for f in (*folder.parents[::-1], folder) if not os.path.lexists(f)]
        make_folder(folder)

    def _acquire(self) -> None:
        """Takes the lock, or refuses with the name of its owner.

        A lock without an owner is waited for: its process has taken it an instant ago and not yet
        written OWNER, or was killed, and its loader processes hold the lock for seconds more.
        """
        from filelock import FileLock, Timeout  # imported here: it takes as long as the rest

        self._lock = FileLock(self.checkpoints / LOCK)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._lock.acquire(timeout=0)
                return
            except NotImplementedError:
                logger.warning("%s: no file locks here; let no other run write", self.checkpoints)
                return
            except Timeout:
                owner = _living_owner(self.checkpoints)
                if owner or time.monotonic() > deadline:
                    form = "process {process} on {machine} ({command}, since {since})"
                    named = form.format_map(owner) if owner else "another process"
                    raise Refused(
                        f"{self.checkpoints}: {named} is training there; wait for it, or give this"
                        f" run a folder of its own with run=NAME"
                    ) from None
                time.sleep(0.05)

    def unlock(self) -> None:
        """Releases the lock; removes the folders that `lock` created where they are empty."""
        held = self._lock is not None and self._lock.is_locked
        with contextlib.suppress(OSError):  # the folder is removed, or read-only by now
            if held:
                (self.checkpoints / OWNER).unlink(missing_ok=True)
            if held and self.checkpoints in self._made and os.listdir(self.checkpoints) == [LOCK]:
                (self.checkpoints / LOCK).unlink()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        with contextlib.suppress(OSError):
            if held:
                self._lock.release()

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Returns the path of a kept epoch's checkpoint, such as epoch_005.pth."""
        return self.checkpoints / f"epoch_{epoch:03}.pth"

    def saved(self) -> list[Path]:
        """Returns the run's checkpoints, in the order in which --resume tries them."""
        return checkpoints_in(self.checkpoints)

    def archive(self) -> Path | None:
        """Moves an earlier run's files to archive/<its start>/ and returns that folder, if any."""
        names = [name + ending for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())]
        left = [path for name in names for path in self.checkpoints.glob(name)]
        left += [path for path in self.logs.paths() if path.exists()]
        if not left:
            return None
        return left[-1].parent / ARCHIVE / self._move(left, self._start_of_earlier(left))

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Moves checkpoints to checkpoints/archive/<now>/, with a copy of history.csv."""
        name = self._move(checkpoints, time.strftime("%Y-%m-%d_%H-%M-%S"))
        target = self.checkpoints / ARCHIVE / name
        with contextlib.suppress(OSError):  # the checkpoints contain the history too
            shutil.copy2(self.logs.history, target / self.logs.history.name)
        return target

    def _move(self, paths: list[Path], stamp: str) -> str:
        """Moves all of the files or none to archive/<stamp>/, or to <stamp>-2 if that exists.

        Where the process is killed meanwhile, the next one to take the lock moves them back.
        """
        folders = [self.checkpoints, self.logs.folder]
        names = (f"{stamp}-{number}" if number > 1 else stamp for number in itertools.count(1))
        name = next(n for n in names if not any(os.path.lexists(f / ARCHIVE / n) for f in folders))
        folders = [f for f in folders if f == self.checkpoints or any(p.parent == f for p in paths)]
        for folder in folders:
            self._make(folder / ARCHIVE)
        unfinished = self.checkpoints / ARCHIVE / UNFINISHED
        write_text(unfinished, name)
        try:
            for folder in folders:
                (folder / ARCHIVE / name).mkdir()
            for path in paths:
                shutil.move(path, path.parent / ARCHIVE / name / path.name)
            for folder in folders:
                sync_folder(folder / ARCHIVE / name)
                sync_folder(folder)
        except (OSError, Stopped):
            self._put_back()
            raise
        unfinished.unlink()
        sync_folder(unfinished.parent)  # so that no power failure brings it back
        return name

    def _put_back(self) -> None:
        """Moves files back where `_move` was interrupted."""
        unfinished = self.checkpoints / ARCHIVE / UNFINISHED
        if not unfinished.exists():
            return
        name = unfinished.read_text(encoding="utf-8")
        for folder in (self.checkpoints, self.logs.folder):
            moved = folder / ARCHIVE / name
            for path in sorted(moved.iterdir()) if moved.is_dir() else ():
                if not os.path.lexists(folder / path.name):
                    shutil.move(path, folder / path.name)
            with contextlib.suppress(OSError):  # it was not created yet
                moved.rmdir()
        unfinished.unlink()

    def _start_of_earlier(self, paths: list[Path]) -> str:
        """Returns the earlier run's start: the log's first time, or that of the oldest file."""
        stamp = ""
        with contextlib.suppress(OSError), open(self.logs.log, "rb") as file:
            stamp = file.readline(19).decode("ascii", "replace")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp):
            oldest = min(path.stat().st_mtime for path in paths)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(oldest))
        return stamp.replace(" ", "_").replace(":", "-")


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder: last.pth, best.pth, then the others, latest first."""
    names = [f"{name}.pth" for name in CHECKPOINTS]
    return [path for name in names for path in sorted(folder.glob(name), reverse=True)]


def is_running(logs: Path) -> bool:
    """Returns whether a process is writing the run with these logs, as far as can be known."""
    checkpoints = re.sub("(.*/)logs(?=/|$)", r"\1checkpoints", logs.resolve().as_posix(), count=1)
    return _living_owner(Path(checkpoints)) is not None


def _living_owner(checkpoints: Path) -> dict[str, Any] | None:
    """Returns what the process that holds the lock has written into OWNER; None if it is dead."""
    try:
        text = (checkpoints / OWNER).read_text(encoding="utf-8")
        owner = {"command": "?", "since": "?", **json.loads(text)}
        process, machine = owner["process"], owner["machine"]
        if machine != platform.node() or os.name == "nt":
            return owner  # it cannot be checked from here; the run removes the file at its end
        if type(process) is not int or process < 1:  # else groups of processes
            return None
        with contextlib.suppress(PermissionError):
            os.kill(process, 0)
    except (OSError, OverflowError, ValueError, TypeError, KeyError):
        return None
    return owner
