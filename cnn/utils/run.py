"""The folders of a run: one process writes them, and an earlier run's files are moved aside."""

import contextlib
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
from typing import Self

from filelock import FileLock, Timeout

from cnn.config import Refused
from cnn.utils.files import make_folder, remove_leftovers

# All that a run leaves, so that only that is ever moved.
LOGS = (
    *("train.log", "history.csv", "config.yaml", "model.txt", "tensorboard", "report.html"),
    *("curves.png", "confusion_matrix.png", "predictions_val.csv", "result.json"),
)
CHECKPOINTS = tuple(
    f"{name}{ending}"  # of the run's own and of what export.py makes of them
    for ending in (".pth", ".pt2", ".onnx", "_weights.pt")
    for name in ("last", "best", "epoch_*")
)

OWNER = ".run.json"
PATIENCE = 10.0  # seconds; loader processes look every 5 whether the one they load for is alive

logger = logging.getLogger(__name__)


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
        self.logs = root / "logs" / (name or "")
        self.checkpoints = root / "checkpoints" / (name or "")
        self.last = self.checkpoints / "last.pth"
        self.best = self.checkpoints / "best.pth"
        self.best_hparams = root / "configs" / "best_hparams"  # of all runs
        self._lock: FileLock | None = None

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
            for folder in (self.logs, self.checkpoints):
                make_folder(folder)
            self._acquire()
            owner = {
                "process": os.getpid(),
                "machine": platform.node(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv),
            }
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                (self.checkpoints / OWNER).write_text(json.dumps(owner), encoding="utf-8")
            for folder in (self.logs, self.checkpoints):
                remove_leftovers(folder)
        except OSError as error:
            self.unlock()
            raise Refused(
                f"{error.filename or self.checkpoints}: cannot be written: {error.strerror}"
            ) from None

    def _acquire(self) -> None:
        """Takes the lock, or finds out who has it.

        It may have been taken an instant ago by a process that has not yet written who it is, or
        still be held by the loader processes of a run just killed, which leave within seconds.
        """
        self._lock = FileLock(self.checkpoints / ".run.lock")
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
        if self._lock is not None and self._lock.is_locked:
            with contextlib.suppress(OSError):  # a folder gone, or read-only by now
                (self.checkpoints / OWNER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._lock.release()

    def _owner(self) -> str | None:
        """The living process that has written itself down, or None."""
        try:
            owner = json.loads((self.checkpoints / OWNER).read_text(encoding="utf-8"))
            if owner["machine"] == platform.node() and not _is_alive(owner["process"]):
                return None
            return (
                f"process {owner['process']} on {owner['machine']}"
                f" ({owner['command']}, since {owner['since']})"
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has_files(self) -> bool:
        """Whether a run has left anything here."""
        return any(
            any(folder.glob(name))
            for folder, names in ((self.logs, LOGS), (self.checkpoints, CHECKPOINTS))
            for name in names
        )

    def archive(self) -> Path | None:
        """Moves an earlier run's files to archive/<its start>/; returns where its logs went."""
        logs = [path for name in LOGS for path in self.logs.glob(name)]
        checkpoints = [path for name in CHECKPOINTS for path in self.checkpoints.glob(name)]
        if not logs and not checkpoints:
            return None
        start = self._start_of_earlier(logs + checkpoints)
        name, number = start, 1
        while any((f / "archive" / name).exists() for f in (self.logs, self.checkpoints)):
            number += 1
            name = f"{start}-{number}"
        for folder, paths in ((self.checkpoints, checkpoints), (self.logs, logs)):
            target = folder / "archive" / name
            for path in paths:
                target.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target / path.name)
        return self.logs / "archive" / name

    def set_aside(self, checkpoints: list[Path]) -> Path:
        """Moves checkpoints to checkpoints/archive/<now>/, with a copy of the history."""
        target = self.checkpoints / "archive" / time.strftime("%Y-%m-%d_%H-%M-%S")
        make_folder(target)
        history = self.logs / "history.csv"
        if history.exists():
            shutil.copy2(history, target / history.name)
        for path in checkpoints:
            shutil.move(path, target / path.name)
        return target

    def _start_of_earlier(self, paths: list[Path]) -> str:
        try:
            with open(self.logs / "train.log", encoding="utf-8") as file:
                stamp = file.readline()[:19]
        except (OSError, UnicodeDecodeError):
            stamp = ""
        if not re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp):
            oldest = min(path.stat().st_mtime for path in paths)
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(oldest))
        return stamp.replace(" ", "_").replace(":", "-")


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
