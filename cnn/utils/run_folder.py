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
from typing import Any

from typing_extensions import Self

from cnn.errors import Refused, Stopped
from cnn.utils.files import make_folder, remove_leftovers, sync_folder, write_text

# The names of checkpoints as patterns, in the order in which --resume tries them.
CHECKPOINTS = ("last", "best", "epoch_*")
# The suffixes of the files that export.py writes.
EXPORTS = {"torch": ".pt2", "onnx": ".onnx", "weights": "_weights.pt"}
LAST = "last.pth"

OWNER, LOCK = ".run.json", ".run.lock"
TIME = "{time}"  # in the setting `run`: when the run began
ARCHIVE = "archive"
# A file in checkpoints/archive/ that exists while files are moved, with the new folder's name.
UNFINISHED = ".unfinished"
CLAIMED: set[Path] = set()  # folders that `new_name` has created
PATIENCE = 10.0  # seconds; loader processes notice within 5 seconds that their run was killed

logger = logging.getLogger(__name__)


class RunLogs:
    """The paths of a run's files in the log folder.

    Args:
        folder: the log folder. The log folder is logs/NAME for a run with a name, and logs for a
            run without a name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "train.log"
        self.history = folder / "history.csv"
        self.config = folder / "config.yaml"
        self.model = folder / "model.txt"
        self.data = folder / "data.txt"
        self.division = folder / "division.csv"
        self.result = folder / "result.json"
        self.val_predictions = folder / "predictions_val.csv"
        self.test_predictions = folder / "predictions_test.csv"
        self.report = folder / "report.html"
        self.curves = folder / "curves.png"
        self.confusion_matrix = folder / "confusion_matrix.png"
        self.roc = folder / "roc.png"
        self.tensorboard = folder / "tensorboard"

    def paths(self) -> list[Path]:
        """Returns the paths of everything that a run can write into the log folder.

        Archiving a run moves only these paths. Any other file in the folder stays.
        """
        return [path for path in vars(self).values() if path != self.folder]


class RunFolder:
    """The log folder and the checkpoint folder of a run: logs/NAME and checkpoints/NAME.

    During a `with` block, only this process may write into the two folders.

    Args:
        name: the name of the run. None stands for a run without a name, which uses the folders logs
            and checkpoints directly.
        root: the folder that contains logs, checkpoints and configs.
        scratch: whether the caller removes the folders when the run ends. If so, the run cannot be
            resumed later.
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
        """Creates the folders, and makes this process the only one that may write there.

        Files of an interrupted move to the archive are moved back. Temporary files that a crash has
        left are removed.

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
        """Creates a folder and all missing parent folders, and adds each to `_made`.

        The list `_made` contains the folders that this process has created. It contains the folder
        that `new_name` has created, too.
        """
        folders = (*folder.parents[::-1], folder)
        self._made += [f for f in folders if not os.path.lexists(f) or f.absolute() in CLAIMED]
        make_folder(folder)

    def _acquire(self) -> None:
        """Takes the lock of the folders.

        If another living process is known to have the lock, Refused is raised at once. Otherwise,
        the method waits for the lock for up to 10 seconds. The loader processes of a killed run
        keep the lock for some seconds. If the file system has no locks, a warning is logged, and no
        lock is taken.

        Raises:
            Refused: another process has the lock. The message describes the other process if
                possible.
        """
        from filelock import FileLock, Timeout  # imported here, since it takes long

        self._lock = FileLock(self.checkpoints / LOCK)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._lock.acquire(timeout=0.05)
                return
            except NotImplementedError:
                logger.warning("%s: no file locks here; let no other run write", self.checkpoints)
                return
            except Timeout:
                owner = _living_owner(self.checkpoints)
                if owner or time.monotonic() > deadline:
                    form = "process {process} on {machine} ({command}, since {since})"
                    named = form.format_map(owner) if owner else "another process"
                    advice = "wait for it, or give this run a folder of its own with run=NAME"
                    fault = f"{named} is training there; {advice}"
                    raise Refused(f"{self.checkpoints}: {fault}") from None

    def unlock(self) -> None:
        """Releases the lock, and removes empty folders that this process has created."""
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
        """Returns the paths of the run's checkpoints, the best to resume from first.

        The order is last.pth, best.pth, and then the checkpoints of single epochs, the latest epoch
        first. Only existing files are returned.
        """
        return checkpoints_in(self.checkpoints)

    def archive(self) -> Path | None:
        """Moves the files of an earlier run in the same folders to archives.

        The files of the log folder move to archive/START in the log folder. Checkpoints and
        exported models move to archive/START in the checkpoint folder. START is the start time of
        the earlier run, such as 2026-11-20_18-45-01. If the name is taken, a number is added.

        Returns:
            The archive in the log folder if a file was moved there, otherwise the archive in the
            checkpoint folder. The result is None if there was nothing to move.
        """
        names = [name + ending for name in CHECKPOINTS for ending in (".pth", *EXPORTS.values())]
        left = [path for name in names for path in self.checkpoints.glob(name)]
        left += [path for path in self.logs.paths() if path.exists()]
        if not left:
            return None
        return left[-1].parent / ARCHIVE / self._move(left, self._start_of_earlier(left))

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Moves checkpoints to an archive, and copies history.csv to the archive.

        The archive is archive/TIME in the checkpoint folder. TIME is the present time, such as
        2026-11-20_18-45-01. If the name is taken, a number is added.

        Args:
            checkpoints: the paths of checkpoints in the run's checkpoint folder.

        Returns:
            The path of the archive.
        """
        name = self._move(checkpoints, time.strftime("%Y-%m-%d_%H-%M-%S"))
        target = self.checkpoints / ARCHIVE / name
        with contextlib.suppress(OSError):  # the checkpoints contain the history too
            shutil.copy2(self.logs.history, target / self.logs.history.name)
        return target

    def _move(self, paths: list[Path], stamp: str) -> str:
        """Moves files of the run to archives: all of the files, or none.

        Files of the checkpoint folder move to archive/STAMP in the checkpoint folder. Files of the
        log folder move to archive/STAMP in the log folder. If the name is taken, STAMP-2 is used,
        then STAMP-3 and so on. If this process is killed during the move, the next process that
        locks the folders moves the files back.

        Args:
            paths: the files, which are in the checkpoint folder or the log folder.
            stamp: the name STAMP, such as "2026-11-20_18-45-01".

        Returns:
            The name that was used: `stamp`, or `stamp` with a number.
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
        """Moves files back from the archives if an earlier move was interrupted.

        Otherwise, the method does nothing.
        """
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
        """Returns the start time of the earlier run in the folders.

        The first line of train.log contains the time. Without such a line, the result is the oldest
        modification time of the given files.

        Args:
            paths: the files of the earlier run.

        Returns:
            A text such as "2026-11-20_18-45-01".
        """
        stamp = ""
        with contextlib.suppress(OSError), open(self.logs.log, "rb") as file:
            stamp = file.readline(19).decode("ascii", "replace")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp):
            oldest = min(path.stat().st_mtime for path in paths)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(oldest))
        return stamp.replace(" ", "_").replace(":", "-")


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the paths of a folder's checkpoints, the best to resume from first.

    The order is last.pth, best.pth, and then the checkpoints of single epochs, such as
    epoch_005.pth, the latest epoch first. Only existing files are returned.
    """
    names = [f"{name}.pth" for name in CHECKPOINTS]
    return [path for name in names for path in sorted(folder.glob(name), reverse=True)]


def new_name(pattern: str) -> str:
    """Returns the name of a run that begins now, and creates checkpoints/NAME.

    Args:
        pattern: the setting `run`, in which {time} stands for the time, as in 20261120_184501.

    Raises:
        Refused: the folder cannot be created.
    """
    folder = Path("checkpoints")
    while True:
        name = pattern.replace(TIME, time.strftime("%Y%m%d_%H%M%S"))
        new = {path.absolute() for path in (folder, folder / name) if not path.exists()}
        try:
            make_folder(folder)
            (folder / name).mkdir()
            CLAIMED.update(new)
            return name
        except FileExistsError:
            time.sleep(0.1)  # another run began in this second
        except OSError as error:
            raise Refused(f"{folder / name}: cannot be written: {error.strerror}") from None


def latest_name(pattern: str, checkpoint: Path | None = None) -> str | None:
    """Returns the name of the latest run with checkpoints; None without one.

    Args:
        pattern: the setting `run`, in which {time} stands for the time that the run began.
        checkpoint: a file of the only run that counts; None for all runs.
    """
    names = re.compile(re.escape(pattern).replace(re.escape(TIME), r"\d{8}_\d{6}"))
    folders = [checkpoint.absolute().parent] if checkpoint else Path("checkpoints").glob("*")
    found = [path for path in folders if names.fullmatch(path.name) and checkpoints_in(path)]
    return max((path.name for path in found), default=None)


def names_of_runs() -> list[str]:
    """Returns the names of the runs in the current folder, those with a log folder."""
    return sorted(path.parent.name for path in Path("logs").glob("*/config.yaml"))


def is_running(logs: Path) -> bool:
    """Returns whether a process is writing the files of a run.

    A process on another machine cannot be checked. Such a process counts as running while the file
    .run.json is in the checkpoint folder.

    Args:
        logs: the log folder of the run, such as logs/NAME.
    """
    checkpoints = re.sub("(.*/)logs(?=/|$)", r"\1checkpoints", logs.resolve().as_posix(), count=1)
    return _living_owner(Path(checkpoints)) is not None


def _living_owner(checkpoints: Path) -> dict[str, Any] | None:
    """Returns a description of the process that is writing a run's files.

    The description comes from the file .run.json in the checkpoint folder. On another machine or on
    Windows, the process cannot be checked, and counts as alive.

    Args:
        checkpoints: the checkpoint folder of the run.

    Returns:
        A dict with the keys "process" (the process id), "machine", "since" and "command". The
        result is None if there is no valid file or the process has ended.
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
