"""Checkpoints: saved so that none is ever torn, read so that none is silently wrong.

The file is an ordinary one of `torch.save`; `torch.load(path, weights_only=True)` opens it. torch
writes a checksum of every member into it and does not look at them when it reads; `load_checkpoint`
does.
"""

import io
import logging
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

from cnn.config import Refused
from cnn.utils.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file; counted up when a reader of before could not read it
KEYS = (
    *("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict"),
    *("ema_state_dict", "epoch", "step", "lr", "unfinished_epoch", "best", "early_stop"),
    *("history", "test", "format", "config", "classes", "preprocessing", "data"),
    *("environment", "started"),
)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, every byte checked, nothing in it executed.

    Raises:
        Refused: the file cannot be read, is damaged, or is no checkpoint of this project.
    """
    data = _read(path)
    _check_members(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Refused(
            f"{path}: holds Python objects that a checkpoint has no use for; not opened, since"
            f" they could run code. Only files written by train.py are read"
        ) from None
    except Exception as error:  # noqa: BLE001  whatever a strange zip file makes torch say
        raise Refused(f"{path}: not a checkpoint: {_first_line(error)}") from None
    return _check_content(path, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        others = sorted(str(p) for p in path.parent.glob("*.pth"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise Refused(f"{path}: no such file{there}") from None
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None


def _check_members(path: Path, data: bytes) -> None:
    """Compares every member of the zip file with its checksum."""
    if not data:
        raise Refused(f"{path}: the file is empty; resume from another one of the run")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError):
        raise Refused(
            f"{path}: not a checkpoint, or a damaged one (it does not read as torch.save's zip"
            f" file); resume from another one of the run"
        ) from None
    if broken is not None:
        raise Refused(
            f"{path}: damaged: the checksum of {broken} does not hold; resume from another one of"
            f" the run, or from a copy"
        )


def _check_content(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise Refused(f"{path}: expected a checkpoint of train.py, got a {type(content).__name__}")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        raise Refused(
            f"{path}: weights alone, without the state of a run; to begin a new run from them, say"
            f" model.weights={path}"
        )
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise Refused(
            f"{path}: written by a newer version (format {content['format']}, this one reads"
            f" {FORMAT}); update this project"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise Refused(f"{path}: not a checkpoint of train.py: without {', '.join(missing[:5])}")
    return content


def snapshot(tree: Any) -> Any:
    """A copy on the CPU that goes on training cannot change."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(snapshot(value) for value in tree)
    return tree


def save_checkpoint(content: dict[str, Any], path: Path, also: tuple[Path, ...] = ()) -> None:
    """Writes the checkpoint durably, once, under `path` and further names beside it.

    Raises:
        OSError: the files of before are as they were.
    """
    write_atomically(path, lambda file: torch.save(content, file), also)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, the newest last.

    A failed write is told loudly and costs nothing but itself: the old file stands, training goes
    on, and the next save tries again.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.failure: str | None = None  # why the latest save did not succeed

    def save(self, content: dict[str, Any], path: Path, also: tuple[Path, ...] = ()) -> None:
        """Copies the content and returns; the file is written meanwhile."""
        self.wait()
        copy = snapshot(content)
        # No daemon: the interpreter waits for a write under way, whatever ends the run.
        self._thread = threading.Thread(target=self._write, args=(copy, path, also), name="saving")
        self._thread.start()

    def _write(self, content: dict[str, Any], path: Path, also: tuple[Path, ...]) -> None:
        try:
            save_checkpoint(content, path, also)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk said
            self.failure = f"{path}: {_disk_reason(error)}"
            logger.error(
                "could not save %s; the file of before is kept, training goes on, the next save"
                " tries again",
                self.failure,
            )
        else:
            self.failure = None

    def wait(self) -> None:
        """Until what was given is on the disk, or its failure told."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _disk_reason(error: BaseException) -> str:
    """The system's own words, dug out of torch's."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
