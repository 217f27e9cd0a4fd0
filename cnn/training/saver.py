"""Saves a run: between steps, after an epoch, and when it has to stop."""

import logging
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from cnn.errors import DataFailed, Failed, Stopped
from cnn.training.resume import readable_checkpoints
from cnn.training.run import Run
from cnn.utils import checkpoint, launch
from cnn.utils.module_state import load_state
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)


class Saver:
    """Saves the state of a run to last.pth, best.pth and epoch_NNN.pth.

    As a context it defers signals to the end of a step. On leaving after a signal or missing data
    it saves, waits for the file being written, and logs the command that resumes the run.
    """

    def __init__(self, run: Run, stop: StopSignals):
        self.run, self.state, self.folder, self.stop = run, run.state, run.folder, stop
        self.writer = checkpoint.CheckpointWriter()
        self._saved_at = self._lap_started_at = time.monotonic()

    def __enter__(self) -> Self:
        self.stop.deferred = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop.deferred = True  # again: a signal may have come just as a wait for a batch ended
        is_whole = isinstance(error, (Stopped, DataFailed))  # else the state may be half changed
        if is_whole:
            self.save()
        self.writer.wait()
        if is_whole:
            self.run.group.barrier()  # torchrun kills the other processes as soon as one has ended
        if self.writer.failure is not None:
            before = f"{error}; and " if isinstance(error, (Failed, DataFailed)) else ""
            what = f"{before}the latest state could not be saved: {self.writer.failure}"
            raise Failed(f"{what}. {self._newest_readable()}") from error
        can_resume = (
            self.folder.last.exists() and not self.folder.scratch and self.run.group.is_rank0
        )
        if error is not None and not isinstance(error, Failed) and can_resume:
            words = launch.command(sys.argv[0], "--resume", self.folder.last.as_posix())
            logger.warning("go on with: %s", shlex.join(words))

    def _newest_readable(self) -> str:
        """Returns a message that names a checkpoint of the run that can be read."""
        for path, content in readable_checkpoints(self.folder.saved()):
            return f"Safe is {path}, {checkpoint.position_text(content)}: --resume {path}"
        return f"No file of this run can be read in {self.folder.checkpoints}"

    def lap(self) -> float:
        """Returns the seconds since the last call, or since the run started."""
        now = time.monotonic()
        passed, self._lap_started_at = now - self._lap_started_at, now
        return passed

    def between_steps(self) -> None:
        """Saves where it is time to, and stops the run after a signal.

        Raises:
            Failed: the loss is no longer finite; nothing is saved.
            Stopped: a signal has come.
        """
        cfg = self.run.cfg.checkpoint
        self.state.seconds += self.lap()
        if self.state.device.type == "cpu":  # elsewhere the check would wait for the device
            self.check_finite()
        is_due = cfg.every_steps is not None and self.state.step % cfg.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        if is_due or minutes >= (cfg.every_minutes or math.inf):
            self.save()
        self.stop.check()

    def end_epoch(self, improved: bool) -> None:
        """Saves a completed epoch to last.pth, and to best.pth or epoch_NNN.pth where it is due.

        Raises:
            Failed: its losses are not finite; nothing is saved.
        """
        row, every = self.state.history[-1], self.run.cfg.checkpoint.every_epochs
        for name in ("train_loss", "val_loss"):
            if not math.isfinite(row[name]):
                self._raise_diverged(f"{name} is no longer a number", row["epoch"])
        is_kept = every is not None and self.state.epoch % every == 0
        kept = (self.folder.epoch_checkpoint(self.state.epoch),) if is_kept else ()
        self.save(self.folder.best if improved else None, kept)

    def save(self, best: Path | None = None, also: tuple[Path, ...] = ()) -> None:
        """Saves last.pth in the background, and the same as the best epoch or under further names.

        Raises:
            Failed: the loss or a weight is not finite; nothing is saved.
        """
        self.check_finite()
        for name, tensor in self.state.model.state_dict().items():
            # The loss shows a NaN in a weight only a step later.
            if isinstance(tensor, torch.Tensor) and tensor.isnan().any():
                self._raise_diverged(f"{name} is no longer a number")
        if self.run.group.is_rank0:
            content = self.state.state_dict() | self.run.metadata
            self.writer.save(content, self.folder.last, best, also)
        self._saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raises Failed where the loss is no longer finite; waits for the device."""
        if not self.state.running_metrics.is_finite():
            self._raise_diverged("the loss is no longer a number")

    def _raise_diverged(self, reason: str, epoch: int | None = None) -> NoReturn:
        state = self.state
        place = f"epoch {epoch or state.epoch + 1}, step {state.step}, lr {state.lr:g}"
        advice = "a lower optim.lr, schedule.warmup_epochs or train.clip_grad_norm may help"
        raise Failed(f"{reason}: {place}; the checkpoints are from before; {advice}")

    def load_best(self, model: nn.Module) -> None:
        """Loads the best epoch's weights; without a best epoch, the latest weights stay.

        Raises:
            Failed: no file holds them, nor does the memory.
        """
        self.writer.wait()
        best, group = self.state.best, self.run.group
        if best is None:
            logger.warning("no epoch was the best one; testing the latest weights")
            return
        weights = None
        with group.agreement():
            if group.is_rank0:
                weights = checkpoint.validated_weights(
                    self.writer.pending_best or self._read_best(best["epoch"])
                )
        load_state(model, group.broadcast(weights))

    def _read_best(self, epoch: int) -> dict[str, Any]:
        """Reads best.pth, or another checkpoint saved at the end of the same epoch."""
        paths = sorted(self.folder.saved(), key=lambda path: path != self.folder.best)
        for _, content in readable_checkpoints(paths):
            if checkpoint.is_end_of_epoch(content, self.run.metadata["started"], epoch):
                return content
        reason = f"the weights of the best epoch, {epoch}, are in no file that can be read: no test"
        advice = f"python evaluate.py --checkpoint {self.folder.last} tests the latest ones"
        raise Failed(f"{reason}. {advice}")
