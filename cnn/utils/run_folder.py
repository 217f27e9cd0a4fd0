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
# A file in checkpoints/archive/ that exists while files are moved, with the new folder's name.
UNFINISHED = ".unfinished"
PATIENCE = 10.0  # seconds; loader processes notice within 5 seconds that their run was killed

logger = logging.getLogger(__name__)


class RunLogs:
    """The paths of the files of a run in its log folder.

    Args:
        folder: logs/NAME, or the folder logs itself for a run without a name.
    """

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
        """Returns the paths of all files that a run may write into its log folder.

        When a run is archived, only these files are moved. Other files in the folder stay.
        """
        return [path for path in vars(self).values() if path != self.folder]


class RunFolder:
    """The log folder and the checkpoint folder of a run: logs/NAME and checkpoints/NAME.

    Within a `with` block, this process is the only one that may write into them.

    Args:
        name: the name of the run; None for a run without a name, whose folders are logs and
            checkpoints themselves.
        root: the folder that contains logs, checkpoints and configs.
        scratch: whether the caller removes the folders when the run ends, so that nothing can
            resume from them.
    """

    def __init__(self, name: str | None, root: Path = Path(), *, scratch: bool = False):
        self.scratch = scratch
        self.logs = RunLogs(root / "logs" / (name or ""))
        self.checkpoints = root / "checkpoints" / (name or "")
        self.last = self.checkpoints / LAST
        self.best = self.checkpoints / "best.pth"
        self.best_hparams = root / "configs" / "best_hparams"  # common to all runs
        self._lock: Any = None  # a FileLock
        self._made: list[Path] = []  # folders that this process created

    def __enter__(self) -> Self:
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def lock(self) -> None:
        """Creates the folders, and makes this process the only one that may write into them.

        If an earlier process was killed while it moved files to the archive, the files are moved
        back. Temporary files that a crash has left are removed.

        Raises:
            Refused: another process is writing into the folders, or the folders cannot be written.
        """
        try:
            self._make(self.checkpoints)
            self._acquire()
            self._make(self.logs.folder)  # with the lock, no other process creates or removes it
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
        """Creates a folder and its missing parents, and adds those that it creates to `_made`."""
        self._made += [f for f in (*folder.parents[::-1], folder) if not os.path.lexists(f)]
        make_folder(folder)

    def _acquire(self) -> None:
        """Takes the lock of the folders.

        If another process has the lock and .run.json names a living process, Refused is raised at
        once. Otherwise, this method waits for the lock for up to 10 seconds: the other process may
        not have written .run.json yet, or it was killed and its loader processes keep the lock for
        some seconds. If the file system does not support locks, a warning is logged and no lock is
        taken.

        Raises:
            Refused: another process has the lock. The message names the process if it is known.
        """
        from filelock import FileLock, Timeout  # imported here, since it takes long

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
        """Releases the lock, and removes the run's folders that are empty.

        A folder is removed only if this process has created it.
        """
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
        """Returns the path of the checkpoint of an epoch, such as checkpoints/epoch_005.pth.

        Args:
            epoch: the number of the epoch, from 1.
        """
        return self.checkpoints / f"epoch_{epoch:03}.pth"

    def saved(self) -> list[Path]:
        """Returns the paths of the run's checkpoints, in the order in which --resume tries them."""
        return checkpoints_in(self.checkpoints)

    def archive(self) -> Path | None:
        """Moves the files of an earlier run, which used the same folders, to an archive.

        Files in the log folder are moved to archive/START in the log folder. Checkpoints and
        exported models are moved to archive/START in the checkpoint folder. START is the time at
        which the earlier run started, such as 2026-11-20_18-45-01; a number is added if that name
        is taken.

        Returns:
            The folder archive/START in the log folder. If no file was moved there, the result is
            the folder archive/START in the checkpoint folder, or None if there was nothing to move.
        """
        names = [name + ending for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())]
        left = [path for name in names for path in self.checkpoints.glob(name)]
        left += [path for path in self.logs.paths() if path.exists()]
        if not left:
            return None
        return left[-1].parent / ARCHIVE / self._move(left, self._start_of_earlier(left))

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Moves checkpoints to archive/TIME in the checkpoint folder, and copies history.csv there.

        TIME is the present time, such as 2026-11-20_18-45-01; a number is added if that name is
        taken.

        Args:
            checkpoints: the paths of the checkpoints, which are in the run's checkpoint folder.

        Returns:
            The folder archive/TIME.
        """
        name = self._move(checkpoints, time.strftime("%Y-%m-%d_%H-%M-%S"))
        target = self.checkpoints / ARCHIVE / name
        with contextlib.suppress(OSError):  # the checkpoints contain the history too
            shutil.copy2(self.logs.history, target / self.logs.history.name)
        return target

    def _move(self, paths: list[Path], stamp: str) -> str:
        """Moves files of the run to new folders archive/STAMP: all of the files, or none.

        A file in the checkpoint folder moves to archive/STAMP in the checkpoint folder, and a file
        in the log folder to archive/STAMP in the log folder. If that name is taken, STAMP-2 is
        used, then STAMP-3 and so on. If this process is killed meanwhile, the next process that
        takes the lock moves the files back.

        Args:
            paths: files in the checkpoint folder and in the log folder.
            stamp: a name for the new folders, such as "2026-11-20_18-45-01".

        Returns:
            The name of the new folders: `stamp`, or `stamp` with a number.
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
        sync_folder(unfinished.parent)  # a power failure then does not bring it back
        return name

    def _put_back(self) -> None:
        """Moves files back from the archive if `_move` was interrupted; does nothing otherwise."""
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
        """Returns when the earlier run in these folders started, such as "2026-11-20_18-45-01".

        This is the time in the first line of train.log. If there is none, it is the time at which
        the oldest of the files was last modified.

        Args:
            paths: the files of the earlier run.
        """
        stamp = ""
        with contextlib.suppress(OSError), open(self.logs.log, "rb") as file:
            stamp = file.readline(19).decode("ascii", "replace")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp):
            oldest = min(path.stat().st_mtime for path in paths)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(oldest))
        return stamp.replace(" ", "_").replace(":", "-")


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the paths of the checkpoints in a folder, in the order in which --resume tries them.

    The order is last.pth, best.pth, and then the checkpoints of single epochs, such as
    epoch_005.pth, from the latest epoch to the first. Those that do not exist are left out.
    """
    names = [f"{name}.pth" for name in CHECKPOINTS]
    return [path for name in names for path in sorted(folder.glob(name), reverse=True)]


def is_running(logs: Path) -> bool:
    """Returns whether a process is writing the files of a run.

    This cannot be checked for a process on another machine. Such a process counts as running until
    it has removed the file .run.json from the checkpoint folder.

    Args:
        logs: the log folder of the run, such as logs/NAME.
    """
    checkpoints = re.sub("(.*/)logs(?=/|$)", r"\1checkpoints", logs.resolve().as_posix(), count=1)
    return _living_owner(Path(checkpoints)) is not None


def _living_owner(checkpoints: Path) -> dict[str, Any] | None:
    """Returns the content of the file .run.json if the process that it describes is alive.

    A process that writes the files of a run describes itself in this file. If it runs on another
    machine, or on Windows, it cannot be checked and counts as alive.

    Args:
        checkpoints: the checkpoint folder of the run, which contains the file.

    Returns:
        A dict with the process id as "process" and with "machine", "since" and "command"; None if
        there is no such file or the process has ended.
    """
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
