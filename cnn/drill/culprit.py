"""Where two runs of one configuration differ first, and what in the user's code causes it."""

import logging
import time
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

# The fields of a record that are compared.
STATE = ("model", "optimizer", "metrics")
FIELDS = ("labels", "images", *STATE)

KEYED = (
    "draw from the global generators of torch, numpy or random, which are keyed by (seed, epoch,"
    " index) for each image"
)
CUDA = "on CUDA, kernels may differ too: train.deterministic=true"
# For each culprit, what differs, why, and what to do.
CAUSES = {
    "data order": "other labels; the dataset lists its images in another order or number in every"
    " process: sort what it reads",
    "restoring": "right after a resume, other {parts}; state_dict() and load_state_dict() lose"
    " something of that state",
    "model": "other initial weights; it draws them from a generator of its own",
    "model randomness": "another loss for the same weights and images; the model has state outside"
    " its state_dict (a counter, a cache: register a buffer) or a generator of its own (use torch's"
    f" global one, which is keyed per step); {CUDA}",
    "optimizer": "the same loss, and other {parts} after the step; the optimizer, or the gradient"
    f" of a layer, remembers something outside its state_dict; {CUDA}",
    "dataset": "other images; {data} returns another image each time for the same index: it has a"
    f" generator of its own, counts its calls or reads the clock; {KEYED}",
    "augmentation": "other images; data.augment ({augment}) makes another image each time from the"
    f" same one: it has a generator of its own or reads the clock; {KEYED}",
    "data": "other images, though one process reads each alike twice; the dataset depends on the"
    " process: on the order of a folder or a set, a hash, or global generators that it draws from"
    " while it is built (seed them there)",
}


@dataclass(frozen=True)
class DrillRun:
    """One of the runs that `train.py --drill` compares.

    Attributes:
        records: a dict for every batch. The dict has the number of the epoch, the index of the
            batch, and hashes of the images and of the state before the batch. A batch in which a
            process was killed is repeated and then has two records.
        checkpoints: the contents of the files last.pth and best.pth, by file name.
        starts: for each process that trained the run, the index in `records` of its first record.
    """

    records: list[Record]
    checkpoints: dict[str, dict[str, Any]]
    starts: list[int]


def log_table(unbroken: DrillRun, runs: dict[str, DrillRun]) -> None:
    """Logs a table that compares runs with an unbroken run.

    Each row is a run. The columns are the number of batches, the labels, the images, the model, the
    optimizer, the metrics, and the checkpoint files. A cell contains "identical" or the first batch
    that differs, such as "epoch 1 batch 4". The cell of a checkpoint file contains "identical" or
    "differs".

    Args:
        unbroken: the run that no signal stopped.
        runs: the runs to compare with `unbroken`, by name such as "stopped".
    """
    columns = [*FIELDS, *unbroken.checkpoints]
    rows = [["", "batches", *columns]]
    for name, run in runs.items():
        cells = dict.fromkeys(columns, "identical")
        for record, parts in reversed(_compare_records(unbroken, run)):  # the first one is set last
            cells |= dict.fromkeys(parts, f"epoch {record['epoch']} batch {record['batch']}")
        for file, content in unbroken.checkpoints.items():
            if any(differences(content, run.checkpoints[file])):
                cells[file] = "differs"
        rows.append([name, str(len(run.records)), *cells.values()])
    for line in align_columns(rows):
        logger.info("%s", line)


def _compare_records(unbroken: DrillRun, run: DrillRun) -> list[tuple[Record, list[str]]]:
    """Compares the records of a run with the records of an unbroken run.

    Two records of the same batch are compared.

    Args:
        unbroken: the run that no signal stopped.
        run: the run to compare with `unbroken`.

    Returns:
        A pair for each record of `run`: the record, and a list of what differs, such as ["images",
        "metrics"]. The list is empty if nothing differs.
    """
    expected = {(record["epoch"], record["batch"]): record for record in unbroken.records}
    compared = []
    for record in run.records:
        other = expected.get((record["epoch"], record["batch"]), {})
        compared.append((record, [name for name in FIELDS if record[name] != other.get(name)]))
    return compared


def find_culprit(cfg: Config, max_batches: int, unbroken: DrillRun, run: DrillRun) -> str | None:
    """Finds the first difference between two runs and the cause of the difference.

    Args:
        cfg: the settings of both runs.
        max_batches: the largest number of batches per split, the same in both runs.
        unbroken: the run that no signal stopped.
        run: the run to compare with `unbroken`.

    Returns:
        A message with the place of the difference, its cause and a remedy; None if the runs are
        identical.
    """
    for number, (record, parts) in enumerate(_compare_records(unbroken, run)):
        if not parts:
            continue
        at = record
        if "labels" in parts:
            kind = "data order"
        elif "images" in parts and len(parts) == 1:
            kind = _blame_images(cfg, max_batches, record)
        elif number == 0:
            kind = "model"
        elif number in run.starts:
            kind = "restoring"
        else:  # the previous step started from the same state and images
            at = run.records[number - 1]
            kind = _blame_step(parts, at, record, unbroken, run)
        cause = CAUSES[kind].format(
            parts=" and ".join(part for part in parts if part in STATE),
            data=cfg.data.name,
            augment=as_text(cfg.data.augment),
        )
        part = f", in {at['part']}" if at["part"] != "training" else ""
        return f"{kind}: at epoch {at['epoch']}, batch {at['batch']}{part}: {cause}"
    for file, content in unbroken.checkpoints.items():
        difference = next(differences(content, run.checkpoints[file]), None)
        if difference is not None:
            return (
                f"the end: {file} differs in {difference}, after the same batches; the validation"
                f" or the last step draws from something that the seed does not key"
            )
    return None


def _blame_step(
    parts: list[str], step: Record, following: Record, unbroken: DrillRun, run: DrillRun
) -> str:
    """Finds out whether the model or the optimizer made two runs differ.

    Both runs began a step with the same state and the same images. The states after the step
    differ.

    Args:
        parts: what differs in the record `following`, such as ["model", "metrics"].
        step: the record of the batch that was used in the step, in `run`.
        following: the next record in `run`, which contains the state after the step.
        unbroken: the run that no signal stopped.
        run: the run that was compared with `unbroken`.

    Returns:
        The culprit: "model randomness" or "optimizer".
    """
    other_loss = "metrics" in parts
    if following["part"] != "training" or following["epoch"] > step["epoch"]:
        # The loss of an epoch's last step is in no record, only in the mean of the epoch.
        histories = [r.checkpoints[LAST]["history"] for r in (unbroken, run)]
        losses = [history[step["epoch"] - 1]["train_loss"] for history in histories]
        other_loss = losses[0] != losses[1]
    # Validation and test have no optimizer steps.
    return "model randomness" if other_loss or step["part"] != "training" else "optimizer"


def _blame_images(cfg: Config, max_batches: int, record: Record) -> str:
    """Finds out why two runs have different images in the same batch.

    The first eight images of the batch are read twice, a second apart, and compared.

    Args:
        cfg: the settings of both runs.
        max_batches: the largest number of batches per split, the same in both runs.
        record: the record of the batch whose images differ.

    Returns:
        The culprit. "dataset" means that the dataset returns other images the second time.
        "augmentation" means that only the augmented images differ. "data" means that the images are
        equal both times.
    """
    run = build_run(cfg, max_batches=max_batches)
    loader, epoch, batch = run.train_loader, record["epoch"], record["batch"]
    if record["part"] == "validation":
        loader, epoch, batch = run.val_loader, EVALUATION, batch - len(loader)
    elif record["part"] == "test":
        loader, epoch = run.test_loader, EVALUATION
    keys = loader.keys(epoch, batch)[:8]
    for kind, read in (("dataset", loader.raw), ("augmentation", loader.image)):
        before = [digest(read(key)) for key in keys]
        time.sleep(1.1)  # for a clock that counts seconds
        if before != [digest(read(key)) for key in keys]:
            return kind
    return "data"
