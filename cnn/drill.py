"""The drill: is *your* run, with your data, model and settings, one that can be stopped anywhere?

`python train.py --drill [settings]` trains a short stretch three times in a scratch folder: unbroken,
unbroken again, and killed (SIGKILL) and resumed several times. Every batch, every tensor after every
step, and the final checkpoints are compared bit by bit; the first difference is traced to where it
comes from.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn.building import build_run
from cnn.config import Config, load_config, replaced, to_yaml
from cnn.datasets.loading import EVALUATION
from cnn.distributed import ALONE
from cnn.saving import Failed
from cnn.trace import Trace, digest
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.compare import differences
from cnn.utils.logger import Log
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)

STEPS = 6  # optimizer steps an epoch of the stretch
EPOCHS = 2
# Where the run is killed: epoch, and share of its training batches (1: in validation); at each, once.
KILLS = ((1, 0.5), (1, 1.0), (2, 0.0), (2, 0.7), (2, 1.0))
TIMEOUT = 600  # seconds for one process

# Each process is a fork of a server that has imported torch once. A fork inherits what it hashes by,
# so that one way through is in an interpreter of its own.
FRESH = multiprocessing.get_context("spawn")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "cnn.building"])

Record = dict[str, Any]
Key = tuple[int, int]  # epoch, batch


@dataclass(frozen=True)
class Stretch:
    """What one way through the stretch left behind."""

    records: list[Record]  # in the order they were written; after a kill, some batches twice
    checkpoints: dict[str, dict[str, Any]]  # last.pth and best.pth
    starts: list[int]  # numbers of the records that came first in a process


def hold_drill(cfg: Config, stop: StopSignals) -> None:
    """Holds the drill and says what it found.

    Raises:
        Failed: the runs differ; the message names the culprit.
    """
    batches = STEPS * cfg.train.accumulate - (cfg.train.accumulate > 1)  # a short last step
    short = replaced(
        cfg,
        run=None,
        train={"epochs": EPOCHS, "early_stop_patience": None},
        schedule={"warmup_epochs": min(cfg.schedule.warmup_epochs, 1)},
        checkpoint={"every_steps": 1, "every_epochs": None},
        log={"report": False, "tensorboard": False},
    )
    with tempfile.TemporaryDirectory(prefix="drill_") as scratch:
        settings = Path(scratch, "config.yaml")
        settings.write_text(to_yaml(short), encoding="utf-8")

        def through(name: str, kills: list[Key], *, fresh: bool = False) -> Stretch:
            stop.check()
            logger.info("%s ...", name)
            return _through(settings, Path(scratch, name), batches, kills, fresh)

        first = through("unbroken", [])
        training = [record["batch"] for record in first.records if not record["validation"]]
        kills = [(epoch, int(share * (max(training) + 1))) for epoch, share in KILLS]
        again = through("unbroken again", [], fresh=True)
        culprit = _find_culprit(short, batches, first, again)
        if culprit is not None:  # then a resume may be refused, and tell less
            _show_table(first, {"again": again})
            raise Failed(f"drill: a second, unbroken run is not the same: {culprit}")
        killed = through(f"killed {len(kills)} times and resumed", kills)
    _show_table(first, {"again": again, "killed": killed})
    culprit = _find_culprit(short, batches, first, killed)
    if culprit is not None:
        raise Failed(f"drill: the killed run is not the same: {culprit}")
    logger.info("drill OK: identical, every batch and every bit; this run can be stopped anywhere")


# -- one way through the stretch ---------------------------------------------------------------


def _through(
    settings: Path, folder: Path, max_batches: int, kills: list[Key], fresh: bool
) -> Stretch:
    """Runs the stretch in processes of its own, each but the last killed at its place.

    Args:
        fresh: in new interpreters that hash in another way, not in forks.
    """
    folder.mkdir()
    trace = folder / "trace.jsonl"
    trace.touch()
    starts = []
    for kill in [*kills, None]:
        starts.append(len(_read(trace)))
        method = multiprocessing.get_start_method()  # that the run's own loaders would use
        process = (FRESH if fresh else CONTEXT).Process(
            target=_child, args=(settings, folder, trace, max_batches, method)
        )
        with _other_hashes() if fresh else contextlib.nullcontext():
            process.start()
        try:
            _wait(process, trace, starts[-1], kill)
        finally:
            _kill(process)  # its workers too
        if process.exitcode not in (0, -signal.SIGKILL):
            log = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise Failed(f"drill: the run itself failed:\n{log.strip()[-3000:]}")
    checkpoints = {
        name: load_checkpoint(folder / "checkpoints" / name) for name in ("last.pth", "best.pth")
    }
    return Stretch(_read(trace), checkpoints, starts)


@contextlib.contextmanager
def _other_hashes() -> Iterator[None]:
    """Interpreters started within put a set of text into another order."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "1" if before != "1" else "2"
    try:
        yield
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before


def _wait(process: BaseProcess, trace: Path, start: int, kill: Key | None) -> None:
    """Until the process ends, or has begun the batch before which it is to be killed."""
    deadline = time.monotonic() + TIMEOUT
    while process.exitcode is None:
        if kill is not None:
            begun = [_key(record) for record in _read(trace)[start:]]
            if begun and begun[-1] >= kill:
                return
        if time.monotonic() > deadline:
            raise Failed(f"drill: a run did not end within {TIMEOUT} s")
        process.join(0.01)


def _kill(process: BaseProcess) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it has no group of its own yet, or is gone
    process.join()


def _read(trace: Path) -> list[Record]:
    """The whole lines of a trace; a killed process may have left half of one."""
    lines = trace.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _child(settings: Path, folder: Path, trace: Path, max_batches: int, method: str) -> None:
    """The process that is killed: goes on from what it finds in the folder."""
    import train
    from cnn import cli
    from cnn.resuming import ResumePoint, find_checkpoint
    from cnn.utils.run import RunFolder

    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cfg, _ = load_config(settings)
    for seed_by_chance in (torch.seed, np.random.seed, random.seed):  # as a new process finds them
        seed_by_chance()

    def act(log: Log, stop: StopSignals) -> None:
        with RunFolder(None, folder, scratch=True) as run_folder:
            found = find_checkpoint(run_folder)
            point = ResumePoint(*found, cfg, []) if found else None
            train.train(cfg, run_folder, log, stop, ALONE, point, max_batches, Trace(trace))

    sys.exit(cli.run(act, {}))


# -- what differs, and why ---------------------------------------------------------------------


def _show_table(first: Stretch, others: dict[str, Stretch]) -> None:
    rows = [("", "batches", "images", "model", "optimizer", "metrics", "last.pth", "best.pth")]
    rows += [(name, *_compare(first, other)) for name, other in others.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        logger.info("%s", line.rstrip())


STATE = {"model": ["model"], "optimizer": ["optimizer"], "metrics": ["loss_sum", "correct"]}


def _compare(first: Stretch, other: Stretch) -> list[str]:
    """The cells of the table: number of batches, then identical or where it first is not."""
    expected = {_key(record): record for record in first.records}
    cells = [str(len(other.records))]
    for fields in (["labels", "images"], *STATE.values()):
        cells.append("identical")
        for record in other.records:
            known = expected.get(_key(record), {})
            if any(record[field] != known.get(field) for field in fields):
                cells[-1] = f"epoch {record['epoch']} batch {record['batch']}"
                break
    for name, content in first.checkpoints.items():
        same = next(differences(content, other.checkpoints[name]), None) is None
        cells.append("identical" if same else "differs")
    return cells


def _key(record: Record) -> Key:
    return record["epoch"], record["batch"]


def _where(record: Record) -> str:
    validation = ", in validation" if record["validation"] else ""
    return f"epoch {record['epoch']}, batch {record['batch']}{validation}"


def _find_culprit(cfg: Config, max_batches: int, first: Stretch, other: Stretch) -> str | None:
    """What the first difference comes from, in words that help; None where there is none."""
    expected = {_key(record): record for record in first.records}
    before: Record | None = None
    for number, record in enumerate(other.records):
        resumed = number in other.starts
        where = _where(record)
        known = expected.get(_key(record))
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
            return _blame_step(differing, before, first, other)
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


def _blame_step(differing: list[str], before: Record | None, first: Stretch, other: Stretch) -> str:
    """The step before started from the same state and images, and ended elsewhere."""
    where = _where(before) if before else "the start"
    losses = [
        [row["train_loss"] for row in stretch.checkpoints["last.pth"]["history"]]
        for stretch in (first, other)
    ]
    if before is None:
        return "model: its first weights differ: it draws them from a generator of its own"
    if "metrics" in differing or losses[0][before["epoch"] - 1] != losses[1][before["epoch"] - 1]:
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
    if record["validation"]:
        loader, epoch, batch = run.val_loader, EVALUATION, batch - len(loader)
    keys = loader.keys(epoch, batch)[:8]
    raw = [[digest(loader.raw(key)) for key in keys] for _ in _two_moments()]
    if raw[0] != raw[1]:
        return (
            f"dataset: at {where} the images are others. {cfg.data.name} gives another image each"
            f" time it is asked for the same one: it draws from a generator of its own, counts its"
            f" calls or reads the clock. Draw from the global generators of torch, numpy or random:"
            f" they are keyed by (seed, epoch, index) for each image"
        )
    made = [[digest(loader.image(key)) for key in keys] for _ in _two_moments()]
    if made[0] != made[1]:
        return (
            f"augmentation: at {where} the images are others. data.augment ({cfg.data.augment})"
            f" makes another image each time from the same one: it reads the clock or draws from a"
            f" generator of its own. Draw from the global generators of torch, numpy or random:"
            f" they are keyed by (seed, epoch, index) for each image"
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
