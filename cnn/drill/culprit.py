"""What differs between two runs of one configuration, and which part of it the difference comes from."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cnn.config import Config, as_text
from cnn.datasets.order import EVALUATION
from cnn.drill.differences import differences
from cnn.drill.trace import digest
from cnn.training.setup import build_run
from cnn.utils.run_folder import LAST
from cnn.utils.screen import align_columns

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Key = tuple[int, int]  # epoch, batch


@dataclass(frozen=True)
class DrillRun:
    """What one way through the stretch left behind."""

    records: list[Record]  # in the order they were written; after a kill, some batches twice
    checkpoints: dict[str, dict[str, Any]]  # last.pth and best.pth
    starts: list[int]  # numbers of the records that came first in a process


def log_table(first: DrillRun, others: dict[str, DrillRun]) -> None:
    """Says of every other way through what was identical, and where it first was not."""
    rows = [("", "batches", "images", "model", "optimizer", "metrics", *first.checkpoints)]
    rows += [(name, *_compare(first, other)) for name, other in others.items()]
    for line in align_columns(rows):
        logger.info("%s", line)


KEYED = (
    "Draw from the global generators of torch, numpy or random: they are keyed by (seed, epoch,"
    " index) for each image"
)
STATE = {"model": ["model"], "optimizer": ["optimizer"], "metrics": ["loss_sum", "correct"]}


def _compare(first: DrillRun, other: DrillRun) -> list[str]:
    """The cells of the table: number of batches, then identical or where it first is not."""
    expected = {key_of(record): record for record in first.records}
    cells = [str(len(other.records))]
    for fields in (["labels", "images"], *STATE.values()):
        cells.append("identical")
        for record in other.records:
            known = expected.get(key_of(record), {})
            if any(record[field] != known.get(field) for field in fields):
                cells[-1] = f"epoch {record['epoch']} batch {record['batch']}"
                break
    for name, content in first.checkpoints.items():
        same = next(differences(content, other.checkpoints[name]), None) is None
        cells.append("identical" if same else "differs")
    return cells


def key_of(record: Record) -> Key:
    """Which batch a record is of."""
    return record["epoch"], record["batch"]


def _where(record: Record) -> str:
    part = f", in {record['part']}" if record["part"] != "training" else ""
    return f"epoch {record['epoch']}, batch {record['batch']}{part}"


def find_culprit(cfg: Config, max_batches: int, first: DrillRun, other: DrillRun) -> str | None:
    """What the first difference comes from, in words that help; None where there is none."""
    expected = {key_of(record): record for record in first.records}
    before: Record | None = None
    for number, record in enumerate(other.records):
        resumed = number in other.starts
        where = _where(record)
        known = expected.get(key_of(record))
        if known is None or record["labels"] != known["labels"]:
            return (
                f"data order: {where} has other labels. The dataset lists its images in another"
                f" order, or has another number of them, in every process: sort what it reads"
            )
        differing = [
            name for name, fields in STATE.items() if any(record[f] != known[f] for f in fields)
        ]
        if differing and (resumed and number > 0):
            return (
                f"restoring: at {where}, right after a resume, {' and '.join(differing)} were not"
                f" what they had been: something in them is lost between state_dict() and"
                f" load_state_dict()"
            )
        if differing:
            at_end = before and (record["part"] != "training" or record["epoch"] > before["epoch"])
            return _blame_step(differing, before, bool(at_end), first, other)
        if record["images"] != known["images"]:
            return _blame_images(cfg, max_batches, record, where)
        before = record
    for name, content in first.checkpoints.items():
        found = next(differences(content, other.checkpoints[name]), None)
        if found is not None:
            return (
                f"the end: every batch was the same, but {name} differs in {found}."
                f" Validation draws from something that the seed does not key, or the last step did"
            )
    return None


def _blame_step(
    differing: list[str], before: Record | None, at_end: bool, first: DrillRun, other: DrillRun
) -> str:
    """The step before started from the same state and images, and ended elsewhere.

    Args:
        at_end: whether it was the epoch's last, whose loss the epoch's mean alone tells.
    """
    if before is None:
        return "model: its first weights differ: it draws them from a generator of its own"
    where = _where(before)
    histories = (stretch.checkpoints[LAST]["history"] for stretch in (first, other))
    losses = {rows[before["epoch"] - 1]["train_loss"] for rows in histories}
    other_loss = len(losses) > 1 if at_end else "metrics" in differing
    if other_loss or before["part"] != "training":  # where no optimizer steps
        return (
            f"model randomness: at {where} it gave another loss for the same weights and images."
            f" It holds state that is not in its state_dict (a counter, a cache: register a buffer),"
            f" or draws from a generator of its own (use torch's global one, keyed for each step);"
            f" on CUDA, kernels may differ too: train.deterministic=true"
        )
    return (
        f"optimizer: at {where} the loss was the same and the {' and '.join(differing)} after it"
        f" were not. The optimizer (or the gradient of some layer) remembers something that is not"
        f" in its state_dict; on CUDA, kernels may differ too: train.deterministic=true"
    )


def _blame_images(cfg: Config, max_batches: int, record: Record, where: str) -> str:
    """Asks for the same images twice, before and after the augmentations."""
    run = build_run(cfg, max_batches=max_batches)
    loader, epoch, batch = run.train_loader, record["epoch"], record["batch"]
    if record["part"] == "validation":
        loader, epoch, batch = run.val_loader, EVALUATION, batch - len(loader)
    elif record["part"] == "test":
        loader, epoch = run.test_loader, EVALUATION
    keys = loader.keys(epoch, batch)[:8]
    raw = [[digest(loader.raw(key)) for key in keys] for _ in _two_moments()]
    if raw[0] != raw[1]:
        return (
            f"dataset: at {where} the images are others. {cfg.data.name} gives another image each"
            f" time it is asked for the same one: it draws from a generator of its own, counts its"
            f" calls or reads the clock. {KEYED}"
        )
    made = [[digest(loader.image(key)) for key in keys] for _ in _two_moments()]
    if made[0] != made[1]:
        return (
            f"augmentation: at {where} the images are others. data.augment ({as_text(cfg.data.augment)})"
            f" makes another image each time from the same one: it reads the clock or draws from a"
            f" generator of its own. {KEYED}"
        )
    return (
        f"data: at {where} the images are others, though each reads the same twice in one process:"
        f" the dataset differs from process to process (the order of a folder or of a set, a hash,"
        f" or draws from torch's, numpy's or random's generator while it is built: seed them there)"
    )


def _two_moments() -> Iterator[None]:
    """Twice, with enough time between for a clock that counts seconds."""
    yield
    time.sleep(1.1)
    yield
