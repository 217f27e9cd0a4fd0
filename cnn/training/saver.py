"""Saves a run: between steps, after an epoch, and when it has to stop."""

import logging
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from typing_extensions import Self

from cnn.errors import DataFailed, Failed, Stopped, add_note
from cnn.training.resume import readable_checkpoints
from cnn.training.run import Run
from cnn.utils import checkpoint, launch
from cnn.utils.module_state import load_state
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)


class Saver:
    """A context manager that saves a run to checkpoints.

    The latest state is saved in last.pth, and the state after the best epoch in best.pth. Further
    files, such as epoch_005.pth, are saved as often as `checkpoint.every_epochs` says.

    In the context, a signal does not interrupt a training step. Stopped is raised after the step.
    If Stopped or DataFailed ends the context, the state is saved. The context ends when all files
    are written. The end of the context raises Failed if the latest state was not saved.

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
        group, folder = self.run.group, self.folder
        self.stop.deferred = True  # again: a signal may have come just as a wait for a batch ended
        is_whole = isinstance(error, (Stopped, DataFailed))  # else the state may be half changed
        if is_whole:
            self.save()
        self.writer.wait()
        if is_whole:
            group.barrier()  # torchrun kills the other processes as soon as one has ended
        if self.writer.failure is not None:
            before = f"{error}; and " if isinstance(error, (Failed, DataFailed)) else ""
            what = f"{before}the latest state could not be saved: {self.writer.failure}"
            raise Failed(f"{what}. {self._newest_readable()}") from error
        can_resume = folder.last.exists() and not folder.scratch and group.is_rank0
        if error is not None and not isinstance(error, Failed) and can_resume:
            if is_whole:
                position = checkpoint.position_text(self.state.state_dict())
                add_note(error, f"saved: {folder.last}, {position}")
            words = launch.command(sys.argv[0], "--resume", folder.last.as_posix())
            add_note(error, f"go on with: {shlex.join(words)}")

    def _newest_readable(self) -> str:
        """Returns a sentence that names the checkpoint from which to resume.

        The sentence is part of an error message. If no checkpoint can be read, the sentence says
        that no file can be read.
        """
        for path, content in readable_checkpoints(self.folder.saved()):
            return f"Safe is {path}, {checkpoint.position_text(content)}: --resume {path}"
        return f"No file of this run can be read in {self.folder.checkpoints}"

    def lap(self) -> float:
        """Returns the seconds since the previous call of this method.

        The first call returns the seconds since the creation of this object.
        """
        now = time.monotonic()
        passed, self._lap_started_at = now - self._lap_started_at, now
        return passed

    def between_steps(self) -> None:
        """Saves a checkpoint if the settings ask for a checkpoint now.

        This method has to be called after every optimizer step. The duration of the step is added
        to `state.seconds`.

        Raises:
            Failed: the loss is not finite, or a weight is NaN when a checkpoint is due. On a GPU,
                the loss is checked only when a checkpoint is due.
            Stopped: a signal has come, and the run has a single process.
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

        The state of the best epoch is saved to best.pth as well. If `checkpoint.every_epochs` is n,
        every n-th epoch is saved to a file such as epoch_005.pth as well.

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
        """Begins to write the state to last.pth.

        Only the process with rank 0 writes, in a background thread.

        Args:
            best: the path of best.pth if the state is to be written to best.pth as well, else None.
            also: further paths to which the state is written, such as the path of epoch_005.pth.

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

        The call waits until the device has computed the loss.
        """
        if not self.state.running_metrics.is_finite():
            self._raise_diverged("the loss is no longer a number")

    def _raise_diverged(self, reason: str, epoch: int | None = None) -> NoReturn:
        state = self.state
        place = f"epoch {epoch or state.epoch + 1}, step {state.step}, lr {state.lr:g}"
        advice = "a lower optim.lr, schedule.warmup_epochs or train.clip_grad_norm may help"
        raise Failed(f"{reason}: {place}; the checkpoints are from before; {advice}")

    def save_temperature(self) -> None:
        """Writes the temperature of the state into best.pth, if it is not 1.

        A failure to write is logged, and the file stays as it was.
        """
        self.writer.wait()
        with self.run.group.agreement():
            if self.state.temperature == 1 or not self.run.group.is_rank0:
                return
            content = self.writer.pending_best or self._read_best(self.state.best["epoch"])
            if content.get("threshold") and content.get("temperature") != self.state.temperature:
                content["threshold"] = None
                path = self.folder.best
                logger.warning("%s: its threshold is of other probabilities: removed", path)
            content["temperature"] = self.state.temperature
            try:
                checkpoint.save_checkpoint(content, self.folder.best)
            except OSError as error:
                logger.warning("%s: its temperature cannot be saved: %s", self.folder.best, error)

    def load_best(self, model: nn.Module) -> None:
        """Loads the weights of the best epoch into a model.

        Every process has to call this method. If the run has no best epoch, the model does not
        change.

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
        """Returns the content of a checkpoint from the end of the best epoch.

        The file best.pth is tried first. The other checkpoints of the run follow.

        Args:
            epoch: the number of the best epoch, from 1.

        Raises:
            Failed: no readable checkpoint is from the end of the best epoch.
        """
        paths = sorted(self.folder.saved(), key=lambda path: path != self.folder.best)
        for _, content in readable_checkpoints(paths):
            if checkpoint.is_end_of_epoch(content, self.run.metadata["started"], epoch):
                return content
        reason = f"the weights of the best epoch, {epoch}, are in no file that can be read: no test"
        advice = f"python evaluate.py --checkpoint {self.folder.last} tests the latest ones"
        raise Failed(f"{reason}. {advice}")
