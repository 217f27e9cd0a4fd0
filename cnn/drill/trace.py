"""A record of every batch a run trains on or validates on, and of the state it meets: what two runs are compared by."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cnn.datasets.loader import Batch
from cnn.metrics.running import Sums
from cnn.training.state import TrainingState


class Trace:
    """Writes a line of JSON for each batch, before the model sees it."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  as long as the process

    def follow(
        self, batches: Iterable[Batch], state: TrainingState, validation: Sums | None = None
    ) -> Iterator[Batch]:
        """Passes the batches of an epoch on, each recorded.

        Args:
            validation: where those of validation are added up; they count on from the training's.
        """
        sums = state.sums if validation is None else validation
        for number, (images, labels) in enumerate(batches, start=state.batch):
            record = {
                "epoch": state.epoch + 1,
                "batch": number,
                "validation": validation is not None,
                "labels": digest(labels),
                "images": digest(images),
                "model": digest(state.model.state_dict()),
                "optimizer": digest(state.optimizer.state_dict()),
                "loss_sum": sums.loss.item(),
                "correct": sums.correct.item(),
            }
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            yield images, labels


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
