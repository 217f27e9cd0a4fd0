"""When a run is saved, and as what: between steps, at an epoch's end, when it is told to stop."""

import logging
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from cnn.errors import DataFailed, Failed, Refused, Stopped
from cnn.training.setup import Run
from cnn.utils import launch
from cnn.utils.checkpoint import (
    CheckpointWriter,
    is_end_of_epoch,
    position_text,
    read_checkpoint,
    validated_weights,
)
from cnn.utils.module_state import load_state
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)


class Saver:
    """Saves the state of a run to last.pth, best.pth and epoch_NNN.pth.

    As a context it sees how the run ends: stopped by a signal, or for want of data, it saves; in any
    case it waits for the file under way, and says how to go on.
    """

    def __init__(self, run: Run, folder: RunFolder, stop: StopSignals):
        self.cfg, self.state, self.metadata = run.cfg.checkpoint, run.state, run.metadata
        self.folder, self.stop = folder, stop
        self.writer = CheckpointWriter()
        self.group = self.state.group  # its first process writes
        self._saved_at = self._ticked_at = time.monotonic()

    def __enter__(self) -> Self:
        # From here on a signal waits for the end of the step; after the last, none is left.
        self.stop.deferred = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop.deferred = True  # also where one has come in the very moment that a wait ended
        if isinstance(error, (Stopped, DataFailed)):
            self.save()
        self.writer.wait()
        if isinstance(error, (Stopped, DataFailed)):
            self.group.wait()  # torchrun kills the others as soon as one has left
        if self.writer.failure is not None:
            before = f"{error}; and " if isinstance(error, (Failed, DataFailed)) else ""
            raise Failed(
                f"{before}the latest state could not be saved: {self.writer.failure}. {self._safe()}"
            ) from error
        hint = self.folder.last.exists() and not self.folder.scratch and self.group.is_rank0
        if error is not None and not isinstance(error, Failed) and hint:
            logger.warning("go on with: %s", self.resume_command())

    def _safe(self) -> str:
        """What of the run is on the disk and whole."""
        for path in self.folder.saved():
            try:
                return f"Safe is {path}, {position_text(read_checkpoint(path))}: --resume {path}"
            except Refused as refusal:
                logger.warning("%s", refusal)
        return f"No file of this run can be read in {self.folder.checkpoints}"

    def resume_command(self) -> str:
        """The exact command that goes on with this run."""
        last = self.folder.last.as_posix()
        return shlex.join(launch.command(sys.argv[0], "--resume", last))

    def seconds(self) -> float:
        """Seconds since the last call of this kind, or since the run began."""
        now = time.monotonic()
        passed, self._ticked_at = now - self._ticked_at, now
        return passed

    def between_steps(self) -> None:
        """After every step: saves where it is time to, and stops where a signal says so.

        Raises:
            Failed: the loss is no number any more; nothing is saved.
            Stopped: a signal has come.
        """
        self.state.seconds += self.seconds()
        if self.state.device.type == "cpu":  # elsewhere it would wait for the device
            self.check_finite()
        every = self.cfg.every_steps
        due = every is not None and self.state.step % every == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        if due or minutes >= (self.cfg.every_minutes or math.inf):
            self.save()
        self.stop.check()

    def end_epoch(self, improved: bool) -> None:
        """Saves a completed epoch: last.pth, and what else it has earned.

        Raises:
            Failed: its losses are no numbers; nothing is saved.
        """
        row = self.state.history[-1]
        for name in ("train_loss", "val_loss"):
            if not math.isfinite(row[name]):
                self._diverged(f"{name} is no longer a number", row["epoch"])
        every = self.cfg.every_epochs
        keep = every is not None and self.state.epoch % every == 0
        kept = (self.folder.epoch_checkpoint(self.state.epoch),) if keep else ()
        self.save(self.folder.best if improved else None, kept)

    def save(self, best: Path | None = None, also: tuple[Path, ...] = ()) -> None:
        """Saves last.pth, and the same as the best epoch or under further names, in the background.

        Raises:
            Failed: the loss or a weight is no number any more; nothing is saved.
        """
        assert all(map(self.folder.owns, also)), f"{also}: in no pattern of run_folder.CHECKPOINTS"
        self.check_finite()
        self._check_weights()
        if not self.group.is_rank0:
            return
        self.writer.save(self.state.state_dict() | self.metadata, self.folder.last, best, also)
        self._saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raises Failed where the loss is no number any more; waits for the device."""
        if not self.state.running_metrics.is_finite():
            self._diverged("the loss is no longer a number")

    def _check_weights(self) -> None:
        """Raises Failed where a weight is NaN, which the loss shows only a step later."""
        for name, tensor in self.state.model.state_dict().items():
            if isinstance(tensor, torch.Tensor) and tensor.isnan().any():
                self._diverged(f"{name} is no longer a number")

    def _diverged(self, what: str, epoch: int | None = None) -> NoReturn:
        state = self.state
        raise Failed(
            f"{what}: epoch {epoch or state.epoch + 1}, step {state.step}, lr {state.lr:g}; the checkpoints"
            f" are from before. A lower optim.lr, a warm-up (schedule.warmup_epochs) or"
            f" train.clip_grad_norm may help"
        )

    def load_best(self, model: nn.Module) -> None:
        """Loads the best epoch's weights; where no epoch was the best one, the latest stay.

        Raises:
            Failed: they are in no file any more, nor in memory.
        """
        self.writer.wait()
        best = self.state.best
        if best is None:
            logger.warning("no epoch was the best one; testing the latest weights")
            return

        def find() -> dict[str, Any]:
            return validated_weights(self.writer.pending_best or self._find_best(best["epoch"]))

        load_state(model, self.group.first(find))

    def _find_best(self, epoch: int) -> dict[str, Any]:
        """The content of best.pth, or of another file that was saved at the end of the same epoch."""
        for path in sorted(self.folder.saved(), key=lambda path: path != self.folder.best):
            try:
                content = read_checkpoint(path)
            except Refused as refusal:
                logger.error("%s", refusal)
                continue
            if is_end_of_epoch(content, self.metadata["started"], epoch):
                return content
        raise Failed(
            f"the weights of the best epoch, {epoch}, are in no file that can be read, and without"
            f" them there is no test. What the latest ones reach: python evaluate.py --checkpoint"
            f" {self.folder.last}"
        )
