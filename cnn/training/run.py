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

MAX_PROBABILITIES = 5_000_000  # of an evaluation, images times classes, to keep in a checkpoint


@dataclass(frozen=True)
class Run:
    """All parts of a run, such as the settings, the data and the model.

    Attributes:
        cfg: the settings.
        folder: the folder to which checkpoints and logs are written.
        group: the processes that train together.
        data: the images of all splits.
        train_loader, val_loader, test_loader: the loaders of the three splits.
        loss: the loss function.
        state: everything that changes during the run, such as the weights of the model.
        train_model: the model in the form that training steps call. The model is compiled if
            `train.compile` is set. With several processes, the model is wrapped in
            DistributedDataParallel.
        precision: the precision of a forward pass: "fp32", "bf16" or "fp16".
        metadata: the constant entries of a checkpoint, such as the settings and the class names.
        trace: an object that records every batch for `train.py --drill`. None in other runs.
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
    def environment(self) -> dict[str, Any]:
        """The versions, the hardware and the precision of the run, as plain values."""
        return self.metadata["environment"]

    def autocast(self) -> torch.autocast:
        """Returns a context that runs a forward pass in the precision of the run."""
        return env.autocast(self.state.device, self.precision)

    def evaluation_metrics(self, *, of_result: bool = False) -> EvaluationMetrics:
        """Returns a new `EvaluationMetrics` without batches.

        The probabilities of all classes are kept, unless there are very many. Those of the final
        test have the temperature of the state.

        Args:
            of_result: if True, the metrics of the final test are computed. If False, the fewer
                metrics of the validation after an epoch are computed.
        """
        number, monitor = len(self.data.classes), self.cfg.checkpoint.monitor
        names = result_metrics(number) if of_result else epoch_metrics(number, monitor)
        images = self.data.test if of_result else self.data.val
        keeps = len(images) * number <= MAX_PROBABILITIES
        temperature = self.state.temperature or 1.0 if of_result else 1.0
        options = {"keeps_probabilities": keeps, "temperature": temperature}
        return EvaluationMetrics(self.state.device, number, names, **options)

    def train_batches(self) -> Iterator[Batch]:
        """Yields the share of this process in each remaining batch of the current epoch."""
        state, loader = self.state, self.train_loader
        batches = loader.train_batches(state.epoch + 1, start=state.batch)
        batches = self.group.synchronized(batches, len(loader) - state.batch)
        return self._traced(batches, "training", state.running_metrics)

    def evaluation_batches(
        self, loader: Loader, part: str, metrics: EvaluationMetrics
    ) -> Iterator[Batch]:
        """Yields the batches that this process evaluates.

        Args:
            loader: the loader of the evaluated split.
            part: the kind of evaluation, "validation" or "test". Only `self.trace` uses this text.
            metrics: the metrics to which the caller adds the batches. Only `self.trace` uses the
                metrics.
        """
        batches = self.group.synchronized(loader.batches(), loader.num_batches_per_rank())
        return self._traced(batches, part, metrics)

    def _traced(self, batches: Iterator[Batch], part: str, metrics: Any) -> Iterator[Batch]:
        if self.trace is None:
            return batches
        return self.trace.record(batches, self.state, part, metrics)
