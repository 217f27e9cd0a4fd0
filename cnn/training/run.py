"""The parts of a run, and its batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnn.config import Config
from cnn.datasets.build import Data
from cnn.datasets.loader import Batch, Loader
from cnn.metrics.running import EvaluationMetrics
from cnn.metrics.scores import epoch_metrics, result_metrics
from cnn.training.distributed import Group
from cnn.training.state import TrainingState
from cnn.utils import environment as env
from cnn.utils.run_folder import RunFolder


@dataclass(frozen=True)
class Run:
    """All parts of a run.

    Attributes:
        group: the processes that train together.
        loss: the loss function.
        train_model: the model compiled and wrapped for several processes, as settings ask for.
        metadata: entries of a checkpoint beside the state.
        trace: the drill's `Trace`, which records every batch; else None.
    """

    cfg: Config
    folder: RunFolder
    group: Group
    data: Data
    train_loader: Loader
    val_loader: Loader
    test_loader: Loader
    loss: nn.Module
    state: TrainingState
    train_model: nn.Module
    precision: str
    metadata: dict[str, Any]
    trace: Any = None

    @property
    def steps_per_epoch(self) -> int:
        return num_steps(self.cfg, self.train_loader)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and other things that results may depend on."""
        return self.metadata["environment"]

    def is_finished(self) -> bool:
        """Returns whether there is nothing left to train."""
        return self.state.is_finished(self.cfg.train.epochs, self.cfg.train.early_stop_patience)

    def autocast(self) -> torch.autocast:
        """Returns the context in which a forward pass has the run's precision."""
        return env.autocast(self.state.device, self.precision)

    def evaluation_metrics(self, *, of_result: bool = False) -> EvaluationMetrics:
        """Returns empty metrics for the validation of an epoch, or for the result of the run."""
        number, monitor = len(self.data.classes), self.cfg.checkpoint.monitor
        names = result_metrics(number) if of_result else epoch_metrics(number, monitor)
        return EvaluationMetrics(self.state.device, number, names)

    def train_batches(self) -> Iterator[Batch]:
        """Yields the batches that are left of the current epoch."""
        state, loader = self.state, self.train_loader
        batches = loader.train_batches(state.epoch + 1, start=state.batch)
        batches = self.group.synchronized(batches, len(loader) - state.batch)
        return self._traced(batches, "training", state.running_metrics)

    def evaluation_batches(
        self, loader: Loader, part: str, metrics: EvaluationMetrics
    ) -> Iterator[Batch]:
        """Yields this process's batches of an evaluation; part and metrics are for the trace."""
        batches = self.group.synchronized(loader.batches(), loader.num_batches_per_rank())
        return self._traced(batches, part, metrics)

    def _traced(self, batches: Iterator[Batch], part: str, metrics: Any) -> Iterator[Batch]:
        if self.trace is None:
            return batches
        return self.trace.record(batches, self.state, part, metrics)


def num_steps(cfg: Config, loader: Loader) -> int:
    """Returns the number of optimizer steps per epoch."""
    return -(-len(loader) // cfg.train.accumulate)
