"""A record of every batch that a run computes, and of the state it meets: what two runs are compared by."""

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
    """Where a run is stopped on purpose, and by which signal."""

    at: tuple[int, int]  # epoch, batch
    signal: int


class Trace:
    """Writes a line of JSON for each batch, before the model sees it.

    Args:
        stop: the batch from which on the process, and with it its loader processes, gets a signal.
    """

    def __init__(self, path: Path, stop: Stop | None = None):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  as long as the process
        self._stop = stop

    def record(
        self, batches: Iterable[Batch], state: TrainingState, part: str, sums: RunningMetrics
    ) -> Iterator[Batch]:
        """Passes batches on, each recorded.

        Args:
            part: training, validation, whose batches count on from the training's, or test, which is
                the epoch after the last.
            sums: where they are added up.
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
                "loss_sum": sums.loss.item(),
                "correct": sums.correct.item(),
            }
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._stop is not None and (state.epoch + 1, number) >= self._stop.at:
                os.killpg(0, self._stop.signal)
            yield batch


def digest(tree: Any) -> str:
    """A hash over every bit of a tree of tensors and plain values."""
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
