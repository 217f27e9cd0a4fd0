"""The folders of a run: one process writes them, and an earlier run's files are moved aside."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from cnn.errors import Refused, Stopped
from cnn.utils.files import make_folder, remove_leftovers, sync_folder, write_text

# Every checkpoint has one of these names, as a pattern; in this order --resume looks for one.
CHECKPOINTS = ("last", "best", "epoch_*")
# What export.py makes of one.
EXPORTS = {"torch": ".pt2", "onnx": ".onnx", "weights": "_weights.pt"}
LAST = "last.pth"

OWNER, LOCK = ".run.json", ".run.lock"
ARCHIVE = "archive"
UNFINISHED = ".unfinished"  # in checkpoints/archive/: the name of the folder that files move to
PATIENCE = 10.0  # seconds; loader processes look every 5 whether the one they load for is alive

logger = logging.getLogger(__name__)


class RunLogs:
    """The files of a run in logs/[NAME/]; only here are their names."""

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
        """All that a run leaves there, so that only that is ever moved."""
        return [path for path in vars(self).values() if path != self.folder]


class RunFolder:
    """logs/[NAME/] and checkpoints/[NAME/] below `root`.

    Args:
        scratch: it is removed when the run ends, so that nobody goes on with it.
        first: has the first process of the run do something, and all know how it went.
    """

    def __init__(
        self,
        name: str | None,
        root: Path = Path(),
        *,
        scratch: bool = False,
        first: Callable[[Callable[[], None]], None] = lambda act: act(),
    ):
        self.scratch, self._first = scratch, first
        self.logs = RunLogs(root / "logs" / (name or ""))
        self.checkpoints = root / "checkpoints" / (name or "")
        self.last = self.checkpoints / LAST
        self.best = self.checkpoints / "best.pth"
        self.best_hparams = root / "configs" / "best_hparams"  # of all runs
        self._lock: Any = None  # a FileLock
        self._made: list[Path] = []  # folders that were not there before

    def __enter__(self) -> Self:
        self._first(self.lock)
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def lock(self) -> None:
        """Makes the folders and this process their only writer.

        Raises:
            Refused: another process is, and which; or the folders cannot be written.
        """
        try:
            self._make(self.checkpoints)
            self._acquire()
            self._make(self.logs.folder)  # by now nobody else makes it, or takes it away again
            self._put_back()
            owner = {
                "process": os.getpid(),
                "machine": platform.node(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv),
            }
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                (self.checkpoints / OWNER).write_text(json.dumps(owner), encoding="utf-8")
            for folder in (self.logs.folder, self.checkpoints):
                remove_leftovers(folder)
        except Refused:
            self.unlock()
            raise
        except OSError as error:
            self.unlock()
            raise Refused(
                f"{error.filename or self.checkpoints}: cannot be written: {error.strerror}"
            ) from None

    def _make(self, folder: Path) -> None:
        """Makes a folder, and remembers what was not there before."""
        self._made += [f for f in (*folder.parents[::-1], folder) if not os.path.lexists(f)]
        make_folder(folder)

    def _acquire(self) -> None:
        """Takes the lock, or finds out who has it.

        It may have been taken an instant ago by a process that has not yet written who it is, or
        still be held by the loader processes of a run just killed, which leave within seconds.
        """
        from filelock import FileLock, Timeout  # takes as long as all else here

        self._lock = FileLock(self.checkpoints / LOCK)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._lock.acquire(timeout=0)
                return
            except NotImplementedError:
                logger.warning(
                    "%s: the file system has no locks; see to it that no second run writes there",
                    self.checkpoints,
                )
                return
            except Timeout:
                owner = self._owner()
                if owner is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise Refused(
                    f"{self.checkpoints}: {owner or 'another process'} is training there; wait for"
                    f" it, or give this run a folder of its own with run=NAME"
                ) from None

    def unlock(self) -> None:
        """Lets others write there; of folders made for a run that left nothing, none stays."""
        held = self._lock is not None and self._lock.is_locked
        with contextlib.suppress(OSError):  # a folder gone, or read-only by now
            if held:
                (self.checkpoints / OWNER).unlink(missing_ok=True)
            if held and self.checkpoints in self._made and os.listdir(self.checkpoints) == [LOCK]:
                (self.checkpoints / LOCK).unlink()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if held:
            with contextlib.suppress(OSError):
                self._lock.release()

    def _owner(self) -> str | None:
        """The living process that has written itself down, or None."""
        owner = _living_owner(self.checkpoints)
        form = "process {process} on {machine} ({command}, since {since})"
        return form.format_map(owner) if owner else None

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint of an epoch that is kept: epoch_005.pth."""
        return self.checkpoints / f"epoch_{epoch:03}.pth"

    def saved(self) -> list[Path]:
        """The run's checkpoints, in the order in which --resume looks for one."""
        return checkpoints_in(self.checkpoints)

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint has a name by which it is archived and found again."""
        return any(checkpoint.match(f"{name}.pth") for name in CHECKPOINTS)

    def archive(self) -> Path | None:
        """Moves an earlier run's files to archive/<its start>/; returns where its logs went, if any."""
        names = [name + ending for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())]
        left = [path for name in names for path in self.checkpoints.glob(name)]
        left += [path for path in self.logs.paths() if path.exists()]
        if not left:
            return None
        return left[-1].parent / ARCHIVE / self._move(left, self._start_of_earlier(left))

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Moves checkpoints to checkpoints/archive/<now>/, with a copy of the history."""
        name = self._move(checkpoints, time.strftime("%Y-%m-%d_%H-%M-%S"))
        target = self.checkpoints / ARCHIVE / name
        with contextlib.suppress(OSError):  # the checkpoints hold it too
            shutil.copy2(self.logs.history, target / self.logs.history.name)
        return target

    def _move(self, paths: list[Path], stamp: str) -> str:
        """Moves all of the files or none to archive/<stamp>/, or <stamp>-2, that nobody has used.

        Cut short at any instant, it is undone by the next process that has the lock.
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
        sync_folder(unfinished.parent)  # lest a power cut has it undone when there is a new run
        return name

    def _put_back(self) -> None:
        """Undoes a move that was cut short: files are where they were, as if it had not begun."""
        unfinished = self.checkpoints / ARCHIVE / UNFINISHED
        if not unfinished.exists():
            return
        name = unfinished.read_text(encoding="utf-8")
        for folder in (self.checkpoints, self.logs.folder):
            moved = folder / ARCHIVE / name
            for path in sorted(moved.iterdir()) if moved.is_dir() else ():
                if not os.path.lexists(folder / path.name):
                    shutil.move(path, folder / path.name)
            with contextlib.suppress(OSError):  # it was not made yet
                moved.rmdir()
        unfinished.unlink()

    def _start_of_earlier(self, paths: list[Path]) -> str:
        try:
            with open(self.logs.log, encoding="utf-8") as file:
                stamp = file.readline()[:19]
        except (OSError, UnicodeDecodeError):
            stamp = ""
        if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp):
            oldest = min(path.stat().st_mtime for path in paths)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(oldest))
        return stamp.replace(" ", "_").replace(":", "-")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder: last.pth, best.pth, then the others, the latest first."""
    return [
        path for name in CHECKPOINTS for path in sorted(folder.glob(f"{name}.pth"), reverse=True)
    ]


def is_running(logs: Path) -> bool:
    """Whether a process of this machine, or any of another, is writing the run with these logs."""
    parts = list(logs.resolve().parts)
    if "logs" not in parts:
        return False
    parts[len(parts) - 1 - parts[::-1].index("logs")] = "checkpoints"
    return _living_owner(Path(*parts)) is not None


def _living_owner(checkpoints: Path) -> dict[str, Any] | None:
    """What the living process that has a run has written down of itself, or None."""
    try:
        text = (checkpoints / OWNER).read_text(encoding="utf-8")
        owner = {"command": "?", "since": "?", **json.loads(text)}
        process, machine = owner["process"], owner["machine"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if machine != platform.node() or os.name == "nt":
        return owner  # it cannot be asked from here; the file goes when the run does
    if type(process) is not int or process < 1:  # 0 and below are groups of processes
        return None
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return None
    return owner
