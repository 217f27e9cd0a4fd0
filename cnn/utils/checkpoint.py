"""Checkpoints: written so that a crash never leaves half of one, and checked before they are used.

This module and `checkpoint_structure` check what a checkpoint must contain. `checked_zip` checks
that the bytes of the file are those that were written.
"""

import contextlib
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from cnn.errors import InvalidValue, Refused, describe
from cnn.utils import checkpoint_structure as structure
from cnn.utils.checked_zip import read_archive, read_plain_values, write_archive
from cnn.utils.files import write_atomically
from cnn.utils.run_folder import RunFolder, checkpoints_in, names_of_runs
from cnn.utils.screen import list_some

logger = logging.getLogger(__name__)

Paths = tuple[Path, ...]

STRUCTURE_HASH = "outline"  # the key of the structure's hash in a checkpoint
FORMAT = 1  # the version of the content; raised when earlier code cannot read the new one


def load_checkpoint(path: Path, option: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint, and checks the bytes and the content of the file.

    Tensors are put on the CPU. Code in the file is never executed.

    Args:
        path: the path of the checkpoint.
        option: the command-line option that an error message suggests, "--resume" or
            "--checkpoint".

    Returns:
        The entries of the checkpoint by name, such as "model_state_dict" and "epoch".

    Raises:
        Refused: the file cannot be read, is damaged, is not a checkpoint of this project, or
            contains weights that are NaN. The message names another intact checkpoint in the same
            folder, or says that there is none.
    """
    try:
        return read_checkpoint(path)
    except Refused as refusal:
        raise Refused(f"{refusal}; {_advice(path, option)}") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, and checks the bytes and the content of the file.

    Tensors are put on the CPU. Code in the file is never executed. If the checkpoint is refused, no
    other checkpoint is searched for.

    Args:
        path: the path of the checkpoint.

    Returns:
        The entries of the checkpoint by name, such as "model_state_dict" and "epoch".

    Raises:
        Refused: the file cannot be read, is damaged, is not a checkpoint of this project, or
            contains weights that are NaN.
    """
    content = read_archive(path)
    _check_kind(path, content)
    try:
        structure.check_content(content)
        saved_hash = content.pop(STRUCTURE_HASH, None)  # files of earlier versions have none
        if saved_hash not in (None, structure.structure_hash(content)):
            advice = f"where that was on purpose, remove the entry {STRUCTURE_HASH!r} too"
            raise InvalidValue(f"settings, numbers or shapes were changed after saving; {advice}")
        for part in ("model_state_dict", "ema_state_dict"):
            for name, value in (content[part] or {}).items():
                if isinstance(value, torch.Tensor) and value.isnan().any():
                    raise InvalidValue(f"{part}.{name}: holds values that are no numbers (NaN)")
    except InvalidValue as mistake:
        raise Refused(f"{path}: {mistake}") from None
    return content


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads all entries of a checkpoint except the state dicts.

    Reading takes milliseconds even for a large file, because the data of the tensors is skipped.

    Args:
        path: the path of the checkpoint.

    Returns:
        The entries by name, such as "started", "epoch", "step" and "unfinished_epoch". None stands
        in place of every tensor in the entries.

    Raises:
        Refused: the file cannot be read, is damaged, or is not a checkpoint of this project. Damage
            in the data of the tensors is not noticed.
    """
    content = read_plain_values(path)
    _check_kind(path, content)
    values = {key: value for key, value in content.items() if not str(key).endswith("_dict")}
    try:
        structure.check_values(values)
        structure.check(values, structure.METADATA)
    except InvalidValue as mistake:
        raise Refused(f"{path}: {mistake}") from None
    return values


def check_readable(content: dict[str, Any]) -> None:
    """Checks that a checkpoint with the given content could be read again.

    Args:
        content: the entries of the checkpoint by name.

    Raises:
        Refused: an entry is missing, has a wrong kind of value, or contradicts another entry.
    """
    try:
        structure.check_content(content)
    except InvalidValue as mistake:
        raise Refused(f"this state could not be read again from a checkpoint: {mistake}") from None


def position_text(content: dict[str, Any]) -> str:
    """Describes how far training had come when a checkpoint was saved.

    Args:
        content: the entries of the checkpoint by name.

    Returns:
        A text such as "after epoch 3 and 2 batches, step 38". The text for the end of an epoch has
        no batches, as in "after epoch 3, step 36".
    """
    batch = content["unfinished_epoch"]["batch"]
    within = f" and {batch} batches" if batch else ""
    return f"after epoch {content['epoch']}{within}, step {content['step']}"


def validated_weights(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the weights with which the model of a checkpoint was validated.

    If the run computes a moving average of the weights (EMA), the result is the average. Otherwise,
    the result is the weights that the optimizer trains.

    Args:
        content: the entries of the checkpoint by name.

    Returns:
        The weights as a state dict.
    """
    return content["ema_state_dict"] or content["model_state_dict"]


def is_end_of_epoch(content: dict[str, Any], started: str, epoch: int) -> bool:
    """Returns whether a checkpoint was saved at the end of a certain epoch.

    Args:
        content: the entries of the checkpoint by name.
        started: the start time of a run, such as "2026-11-20 18:45:01.123456". The result is False
            if the checkpoint belongs to another run.
        epoch: the number of the epoch, from 1.
    """
    position = content["started"], content["epoch"], content["unfinished_epoch"]["batch"]
    return position == (started, epoch, 0)


def _advice(path: Path, option: str) -> str:
    """Returns advice for a user whose checkpoint cannot be read.

    Args:
        path: the path of the unreadable checkpoint, or of a folder.
        option: the command-line option that the advice suggests, such as "--resume".

    Returns:
        The end of an error message. The text names another intact checkpoint in the same folder, or
        says that there is none.
    """
    others = [p for p in checkpoints_in(path if path.is_dir() else path.parent) if p != path]
    for other in others:
        with contextlib.suppress(Refused):
            return f"{other} is whole ({position_text(read_checkpoint(other))}): {option} {other}"
    runs = [RunFolder(name).last for name in (None, *names_of_runs())]
    some = list_some([str(file) for file in runs if file.is_file() and file != path])
    return f"there is no other file beside it that is whole; other runs have {some or 'none'}"


def _check_kind(path: Path, content: Any) -> None:
    """Checks that a value from a file is a checkpoint of a known format.

    Args:
        path: the path of the file, for the error message.
        content: the value from the file.

    Raises:
        Refused: the value is not a dict, contains weights alone, was written by a newer version of
            this project, or lacks a required entry.
    """
    if not isinstance(content, dict):
        kind = structure.describe_value(content)
        raise Refused(f"{path}: expected a checkpoint of train.py, got {kind}")
    is_state = bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())
    of_training = {"optimizer_state_dict", "step"} & content.keys()
    if is_state or ("model_state_dict" in content and not of_training):  # export.py writes it
        advice = f"to begin a new run from them, say model.weights={path}"
        raise Refused(f"{path}: weights alone, without the state of a run; {advice}")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise Refused(f"{path}: written by a newer version of this project; update it")
    missing = [key for key in structure.KEYS if key not in content]
    if missing:
        named = ", ".join(missing[:5])
        weights = f"; to begin a new run from its weights, say model.weights={path}"
        advice = "" if {"format", "config"} & content.keys() else weights  # another program's
        reason = f"not a checkpoint of train.py, or not all of one: {named} missing"
        raise Refused(f"{path}: {reason}{advice}")


def clone_tree(tree: Any, device: torch.device | str | None = "cpu") -> Any:
    """Copies a tensor, or nested dicts, lists and tuples with all their tensors.

    Values of other types are not copied, but shared with the original.

    Args:
        tree: the tensor, dict, list or tuple to copy.
        device: the device for all copied tensors. None leaves each copy on the device of the
            original tensor.

    Returns:
        The copy.
    """
    if isinstance(tree, torch.Tensor):
        return tree.detach().to(device, copy=True)
    if isinstance(tree, dict):
        return {key: clone_tree(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(clone_tree(value, device) for value in tree)
    return tree


def estimate_bytes(tree: Any) -> int:
    """Estimates the size of a checkpoint's file in bytes.

    Args:
        tree: the content of the file: nested dicts, lists and tuples of tensors and plain values.
    """
    if isinstance(tree, torch.Tensor):
        return tree.nbytes + 300  # zip headers, alignment, pickled shape
    if isinstance(tree, structure.CONTAINERS):
        values = tree.values() if isinstance(tree, dict) else tree
        return 20 + sum(map(estimate_bytes, values))
    return 20


def save_checkpoint(content: dict[str, Any], path: Path, also: Paths = ()) -> None:
    """Writes a checkpoint to one or more files in the same folder.

    Args:
        content: the entries of the checkpoint by name.
        path: the path of the file.
        also: the paths of further files with the same content. The further files are written before
            the file at `path`.

    Raises:
        OSError: a file cannot be written. Each file then has either the old or the new content.
    """
    content = content | {STRUCTURE_HASH: structure.structure_hash(content)}
    write_atomically(path, lambda file: write_archive(content, file), also)


class CheckpointWriter:
    """A writer that saves checkpoints in a background thread, one after the other.

    If a write fails, the error is logged, the previous file stays, and training continues. If the
    checkpoint of the best epoch could not be written, the next save tries again.

    Attributes:
        failure: the reason why the latest write failed; None if the latest write succeeded.
        pending_best: the content of the best epoch's checkpoint until the checkpoint is written;
            None if nothing is waiting.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self.pending_best: dict[str, Any] | None = None
        self._best_path: Path | None = None
        self._thread: threading.Thread | None = None

    def save(
        self, content: dict[str, Any], path: Path, best: Path | None = None, also: Paths = ()
    ) -> None:
        """Copies the content of a checkpoint, and writes the copy in a background thread.

        If the previous write is still going on, the method first waits for the end of that write.

        Args:
            content: the entries of the checkpoint by name.
            path: the path of the file, such as checkpoints/last.pth.
            best: a further path for the checkpoint of the best epoch so far, such as
                checkpoints/best.pth; None if another epoch was better.
            also: further paths for the same content, such as checkpoints/epoch_005.pth.

        Raises:
            Refused: the content does not have the structure of a checkpoint. Nothing is written.
        """
        self.wait()
        copy = clone_tree(content)
        check_readable(copy)
        if best is not None:
            self.pending_best, self._best_path = copy, best
        # Not a daemon: the interpreter waits for it at exit, however the run ends.
        self._thread = threading.Thread(target=self._write, args=(copy, path, also), name="saving")
        self._thread.start()

    def _write(self, content: dict[str, Any], path: Path, also: Paths) -> None:
        try:
            if self.pending_best is content:
                also = (self._best_path, *also)
            elif self.pending_best is not None:  # first, since last.pth refers to it
                save_checkpoint(self.pending_best, self._best_path)
                self.pending_best = None
            save_checkpoint(content, path, also)
            self.pending_best = self.failure = None
        except Exception as error:  # noqa: BLE001  training can continue anyway
            reason = getattr(error, "strerror", None) or describe(error)
            self.failure = f"{path}: {reason}; {_space(content, path)}"
            effect = "The file of before is kept, training goes on, the next save tries again"
            logger.error("could not save %s. %s", self.failure, effect)

    def wait(self) -> None:
        """Waits until the latest checkpoint is written, or until the write has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _space(content: dict[str, Any], path: Path) -> str:
    """Describes the size of a checkpoint and the free space on the disk.

    Args:
        content: the entries of the checkpoint by name.
        path: the path of the checkpoint. The folder of the checkpoint is on the disk in question.

    Returns:
        A text such as "it needs 5.1 MB, checkpoints has 2.3 MB free". Unknown free space is left
        out.
    """
    free = ""
    with contextlib.suppress(OSError):  # the folder may be removed
        free = f", {path.parent} has {_size(shutil.disk_usage(path.parent).free)} free"
    return f"it needs {_size(estimate_bytes(content))}{free}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"
