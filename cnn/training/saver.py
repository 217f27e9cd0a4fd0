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
    """A context manager that saves a run to its checkpoints.

    The latest state is saved in last.pth, and the state after the best epoch in best.pth. The state
    after every `checkpoint.every_epochs`-th epoch is saved in a file such as epoch_005.pth.

    Within the context, a signal does not interrupt a training step: Stopped is raised when the step
    is done. If Stopped or DataFailed ends the context, the state is saved. The context ends when
    all files are written. It raises Failed if the latest state could not be saved. After any error
    except Failed, the command that resumes the run is logged.

    Args:
        run: the run whose state is saved.
        stop: the signal handlers of this process.
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
        """Returns a sentence for an error message, which says from where the run can be resumed.

        The sentence names last.pth or, if last.pth cannot be read, another checkpoint of the run.
        If no checkpoint can be read, the sentence says so.
        """
        for path, content in readable_checkpoints(self.folder.saved()):
            return f"Safe is {path}, {checkpoint.position_text(content)}: --resume {path}"
        return f"No file of this run can be read in {self.folder.checkpoints}"

    def lap(self) -> float:
        """Returns the seconds since the previous call of this method.

        The first call returns the seconds since this object was created.
        """
        now = time.monotonic()
        passed, self._lap_started_at = now - self._lap_started_at, now
        return passed

    def between_steps(self) -> None:
        """Saves a checkpoint if one is due, and stops the run if a signal has come.

        Has to be called after every optimizer step. The duration of the step is added to
        `state.seconds`. On the CPU the loss is checked after every step, on other devices only when
        a checkpoint is due.

        Raises:
            Failed: the loss is not finite, or a checkpoint is due and a weight is NaN. The
                checkpoint is then not saved.
            Stopped: a signal has come. If the run has several processes, this method ignores
                signals.
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
        """Saves the state after a completed epoch to last.pth.

        If the epoch is the best one so far, the state is saved to best.pth, too. After every
        `checkpoint.every_epochs`-th epoch, the state is saved to a file such as epoch_005.pth, too.

        Args:
            improved: whether the epoch is the best one so far.

        Raises:
            Failed: the training loss or the validation loss is not finite, or a weight is NaN. The
                state is then not saved.
        """
        row, every = self.state.history[-1], self.run.cfg.checkpoint.every_epochs
        for name in ("train_loss", "val_loss"):
            if not math.isfinite(row[name]):
                self._raise_diverged(f"{name} is no longer a number", row["epoch"])
        is_kept = every is not None and self.state.epoch % every == 0
        kept = (self.folder.epoch_checkpoint(self.state.epoch),) if is_kept else ()
        self.save(self.folder.best if improved else None, kept)

    def save(self, best: Path | None = None, also: tuple[Path, ...] = ()) -> None:
        """Begins to write the state to last.pth, in a background thread of rank 0.

        Args:
            best: the path of best.pth, if the state is to be written there, too; otherwise None.
            also: further paths to which the state is written, such as that of epoch_005.pth.

        Raises:
            Failed: the loss is not finite, or a weight is NaN. The state is then not saved.
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
        """Raises Failed if the training loss of the current epoch is not finite.

        Waits until the device has computed the loss.
        """
        if not self.state.running_metrics.is_finite():
            self._raise_diverged("the loss is no longer a number")

    def _raise_diverged(self, reason: str, epoch: int | None = None) -> NoReturn:
        state = self.state
        place = f"epoch {epoch or state.epoch + 1}, step {state.step}, lr {state.lr:g}"
        advice = "a lower optim.lr, schedule.warmup_epochs or train.clip_grad_norm may help"
        raise Failed(f"{reason}: {place}; the checkpoints are from before; {advice}")

    def load_best(self, model: nn.Module) -> None:
        """Loads the weights of the best epoch into a model.

        Every process has to call this method. The weights are read from a checkpoint of the run. If
        they could not be saved, they are still in memory and are taken from there. If the run has
        no best epoch, the model does not change.

        Args:
            model: the model to test, which is changed in place.

        Raises:
            Failed: no readable checkpoint contains the weights of the best epoch.
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
        """Returns the content of a checkpoint that was saved at the end of the best epoch.

        The file best.pth is tried first, and then the other checkpoints of the run.

        Args:
            epoch: the number of the best epoch, from 1.

        Raises:
            Failed: no readable checkpoint was saved at the end of that epoch.
        """
        paths = sorted(self.folder.saved(), key=lambda path: path != self.folder.best)
        for _, content in readable_checkpoints(paths):
            if checkpoint.is_end_of_epoch(content, self.run.metadata["started"], epoch):
                return content
        reason = f"the weights of the best epoch, {epoch}, are in no file that can be read: no test"
        advice = f"python evaluate.py --checkpoint {self.folder.last} tests the latest ones"
        raise Failed(f"{reason}. {advice}")
