"""Checkpoints: saved so that none is ever torn, read so that none is silently wrong.

What a file must hold is checked here before anything of it is used; that its bytes are those that
were written, in `checked_zip`.
"""

import logging
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from cnn.errors import InvalidValue, Refused
from cnn.utils import checkpoint_structure as structure
from cnn.utils.checked_zip import read_archive_and_size, write_archive
from cnn.utils.files import write_atomically
from cnn.utils.run_folder import checkpoints_in

logger = logging.getLogger(__name__)

OUTLINE = "outline"  # the key of a hash over all but the many numbers in tensors
FORMAT = 1  # of the content; counted up when a reader of before could not read it


def load_checkpoint(path: Path, option: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint to the CPU, every byte checked, nothing in it executed.

    Args:
        option: of the command line that takes another file.

    Raises:
        Refused: the file cannot be read, is damaged, or is no checkpoint of this project; the
            message names another file of the run that is whole, where there is one.
    """
    try:
        return read_checkpoint(path)
    except Refused as refusal:
        raise Refused(f"{refusal}; {_advice(path, option)}") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """As `load_checkpoint`, for a caller that itself looks for another file."""
    content, size = read_archive_and_size(path)
    _check_kind(path, content)
    try:
        _check_content(content, size)
    except InvalidValue as mistake:
        raise Refused(f"{path}: {mistake}") from None
    return content


def _check_content(content: dict[str, Any], size: int) -> None:
    """Holds what a file holds against what it must; raises InvalidValue, beginning with the key."""
    claimed = structure.check_values(content)
    if claimed > size:
        raise InvalidValue(f"its tensors claim {claimed:,} bytes, the file has {size:,}")
    outline = content.pop(OUTLINE, None)  # not in files of before
    structure.check_content(content)
    if outline not in (None, structure.outline_of(content)):
        raise InvalidValue(
            f"its settings, numbers or shapes are not those that were saved; where they were changed"
            f" on purpose, take the entry {OUTLINE!r} out too"
        )
    for part in ("model_state_dict", "ema_state_dict"):
        for name, value in (content[part] or {}).items():
            if isinstance(value, torch.Tensor) and value.isnan().any():
                raise InvalidValue(f"{part}.{name}: holds values that are no numbers (NaN)")


def check_readable(content: dict[str, Any], *, whole: bool = True) -> None:
    """Refuses a content that would be refused where it is read.

    Args:
        whole: else only whether it is a tree of plain values and tensors, which is quick.
    """
    try:
        structure.check_values(content)
        if whole:
            structure.check_content(content)
    except InvalidValue as mistake:
        raise Refused(f"this state could not be read again from a checkpoint: {mistake}") from None


def where(content: dict[str, Any]) -> str:
    """Where a checkpoint stands, in words."""
    batch = content["unfinished_epoch"]["batch"]
    within = f" and {batch} batches" if batch else ""
    return f"after epoch {content['epoch']}{within}, step {content['step']}"


def validated_weights(content: dict[str, Any]) -> dict[str, Any]:
    """The weights that were validated: the averaged ones where there are some."""
    return content["ema_state_dict"] or content["model_state_dict"]


def is_end_of_epoch(content: dict[str, Any], started: str, epoch: int) -> bool:
    """Whether a checkpoint is what that run had at the end of that epoch."""
    at = content["started"], content["epoch"], content["unfinished_epoch"]["batch"]
    return at == (started, epoch, 0)


def _advice(path: Path, option: str) -> str:
    """Which other file of the run is good."""
    for other in checkpoints_in(path if path.is_dir() else path.parent):
        if other != path:
            try:
                return f"{other} is whole ({where(read_checkpoint(other))}): {option} {other}"
            except Refused:
                continue
    return "there is no other file beside it that is whole; a copy elsewhere may be"


def _check_kind(path: Path, content: Any) -> None:
    """Refuses what is no checkpoint of ours, and what a later version wrote."""
    if not isinstance(content, dict):
        raise Refused(
            f"{path}: expected a checkpoint of train.py, got {structure.describe_value(content)}"
        )
    is_state = bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())
    of_a_run = {"optimizer_state_dict", "step"} & content.keys()
    if is_state or ("model_state_dict" in content and not of_a_run):  # export.py's
        raise Refused(
            f"{path}: weights alone, without the state of a run; to begin a new run from them, say"
            f" model.weights={path}"
        )
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise Refused(
            f"{path}: written by a newer version of this project (format {version}, this one reads"
            f" {FORMAT}); update it"
        )
    missing = [key for key in structure.KEYS if key not in content]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise Refused(
            f"{path}: not a checkpoint of train.py, or not all of one: {', '.join(missing[:5])}"
            f"{more} missing"
        )


def snapshot(tree: Any, device: torch.device | str | None = "cpu") -> Any:
    """A copy of a tree of tensors and plain values that training cannot change.

    Args:
        device: where its tensors are put; None: where they are.
    """
    if isinstance(tree, torch.Tensor):
        return tree.detach().to(device, copy=True)
    if isinstance(tree, dict):
        return {key: snapshot(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(snapshot(value, device) for value in tree)
    return tree


def estimate_bytes(tree: Any) -> int:
    """About how large the file of a content is: its tensors, and what torch.save adds to each."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size() + 300  # zip headers, alignment, pickled shape
    if isinstance(tree, structure.CONTAINERS):
        values: Iterable[Any] = tree.values() if isinstance(tree, dict) else tree
        return 20 + sum(estimate_bytes(value) for value in values)
    return 20


def save_checkpoint(content: dict[str, Any], path: Path, also: tuple[Path, ...] = ()) -> None:
    """Writes the checkpoint durably, once, under `path` and further names beside it.

    Raises:
        OSError: the files of before are as they were.
    """
    content = content | {OUTLINE: structure.outline_of(content)}
    write_atomically(path, lambda file: write_archive(content, file), also)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, the newest last.

    A failed write is told loudly and costs nothing but itself: the old file stands, training goes
    on, and the next save tries again; also for the best epoch, whose weights are kept until then.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._owed: tuple[dict[str, Any], Path] | None = None  # a best epoch not yet on the disk
        self.failure: str | None = None  # why the latest save did not succeed
        self._is_first = True  # the next save, which is held against the whole description

    def save(
        self,
        content: dict[str, Any],
        path: Path,
        best: Path | None = None,
        also: tuple[Path, ...] = (),
    ) -> None:
        """Copies the content and returns; the file is written meanwhile.

        Args:
            best: where the same goes as the best epoch, if it is that.
            also: further names for it.

        Raises:
            Refused: the file could not be read again; nothing is saved.
        """
        self.wait()
        copy = snapshot(content)
        check_readable(copy, whole=self._is_first)
        self._is_first = False
        if best is not None:
            self._owed = copy, best
        # No daemon: the interpreter waits for a write under way, whatever ends the run.
        self._thread = threading.Thread(target=self._write, args=(copy, path, also), name="saving")
        self._thread.start()

    def _write(self, content: dict[str, Any], path: Path, also: tuple[Path, ...]) -> None:
        try:
            if self._owed is not None and self._owed[0] is content:
                also = (self._owed[1], *also)
            elif self._owed is not None:  # first: last.pth never tells of a best that is not there
                save_checkpoint(*self._owed)
                self._owed = None
            save_checkpoint(content, path, also)
            self._owed = self.failure = None
        except Exception as error:  # noqa: BLE001  whatever it is, training can go on
            self.failure = f"{path}: {_reason(error)}; {_space(content, path)}"
            logger.error(
                "could not save %s. The file of before is kept, training goes on, the next save"
                " tries again",
                self.failure,
            )

    @property
    def owed(self) -> dict[str, Any] | None:
        """The best epoch's content, where it could not be written yet."""
        return self._owed and self._owed[0]

    def wait(self) -> None:
        """Until what was given is on the disk, or its failure told."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _reason(error: Exception) -> str:
    """The system's own words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _space(content: dict[str, Any], path: Path) -> str:
    """How much room the save needs, and how much there is."""
    needs = f"it needs {_size(estimate_bytes(content))}"
    try:
        return f"{needs}, {path.parent} has {_size(shutil.disk_usage(path.parent).free)} free"
    except OSError:
        return f"{needs} in {path.parent}"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
