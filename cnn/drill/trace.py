"""Records every batch of a run and the state before it, so that runs can be compared."""

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
    """The place at which a run is stopped on purpose, and the signal.

    Attributes:
        at: a pair for the batch before which the run is stopped. The pair consists of the number of
            the epoch, from 1, and the index of the batch in the epoch, from 0.
        signal: the number of the signal.
    """

    at: tuple[int, int]  # epoch, batch
    signal: int


class Trace:
    """The writer of a file with a record of each batch of a run.

    A record is a line of JSON. The record is appended to the file before the model sees the batch.

    Args:
        path: the path of the file.
        stop: the batch before which a signal stops the run; None for no stop. The signal is sent to
            this process and to its DataLoader workers, before this batch and before each later
            batch.
    """

    def __init__(self, path: Path, stop: Stop | None = None):
        # Written line by line, and open as long as the process.
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._stop = stop

    def record(
        self, batches: Iterable[Batch], state: TrainingState, part: str, metrics: RunningMetrics
    ) -> Iterator[Batch]:
        """Writes a record of each batch, and yields the batches unchanged.

        A record contains hashes of the images, the labels, the model and the optimizer, and the
        sums of the metrics. All values are from before the model sees the batch. A record also
        contains the number of the epoch, from 1, and the index of the batch, from 0. The indices of
        validation batches follow the indices of the training batches. The test counts as the epoch
        after the last epoch.

        Args:
            batches: the batches of one split, in the order in which the model sees the batches.
            state: the state of the run. The state has the present epoch, and the index of the next
                batch.
            part: "training", "validation" or "test".
            metrics: the metrics to which the caller adds each batch.

        Yields:
            Each batch.
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
                "metrics": [metrics.loss.item(), metrics.correct.item()],
            }
            self._file.write(json.dumps(record) + "\n")
            if self._stop is not None and (state.epoch + 1, number) >= self._stop.at:
                os.killpg(0, self._stop.signal)
            yield batch


def digest(tree: Any) -> str:
    """Returns a hash of tensors and plain values, as 16 hexadecimal digits.

    The hash depends on every bit of the tensors, on their shapes, and on their dtypes.

    Args:
        tree: a tensor, a plain value, or nested dicts, lists and tuples of tensors and plain
            values.
    """
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
