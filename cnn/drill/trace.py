"""A record of every batch of a run and of the state that it meets, by which runs are compared."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnn.datasets.loader import Batch
from cnn.metrics.running import RunningMetrics
from cnn.training.state import TrainingState


class Stop(NamedTuple):
    """A batch before which a run is stopped on purpose, and the signal that stops it."""

    at: tuple[int, int]  # epoch, batch
    signal: int


class Trace:
    """Writes a line of JSON for each batch, before the model sees it.

    Args:
        stop: the batch from which on the process, and its loader processes, get a signal.
    """

    def __init__(self, path: Path, stop: Stop | None = None):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open as long as the process
        self._stop = stop

    def record(
        self, batches: Iterable[Batch], state: TrainingState, part: str, metrics: RunningMetrics
    ) -> Iterator[Batch]:
        """Passes batches on, each of them recorded.

        Args:
            part: training, validation (whose batches count on from the training's), or test (which
                counts as the epoch after the last).
            metrics: to which the batches are added.
        """
        for number, batch in enumerate(batches, start=state.batch):
            images, labels, _ = batch
            record = {
                "epoch": state.epoch + 1,
                "batch": number,
                "part": part,
                "labels": digest(labels),
                "images": digest(images),
                "model": digest(state.model.state_dict()),
                "optimizer": digest(state.optimizer.state_dict()),
                "loss_sum": metrics.loss.item(),
                "correct": metrics.correct.item(),
            }
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._stop is not None and (state.epoch + 1, number) >= self._stop.at:
                os.killpg(0, self._stop.signal)
            yield batch


def digest(tree: Any) -> str:
    """Returns a hash over every bit of a tree of tensors and plain values."""
    total = hashlib.sha256()
    _add(tree, total)
    return total.hexdigest()[:16]


def _add(tree: Any, total: "hashlib._Hash") -> None:
    if isinstance(tree, torch.Tensor):
        flat = tree.detach().cpu().contiguous().flatten()
        total.update(str((tree.dtype, tuple(tree.shape))).encode())
        total.update(flat.view(torch.uint8).numpy())
    elif isinstance(tree, dict):
        for key, value in tree.items():
            total.update(repr(key).encode())
            _add(value, total)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            _add(value, total)
    else:
        total.update(repr(tree).encode())
