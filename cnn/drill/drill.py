"""The drill: tests whether *your* run, with your data, model and settings, can be stopped anywhere.

`python train.py --drill [settings]` trains a few steps three times in a scratch folder: unbroken,
unbroken again, and stopped (SIGKILL and SIGTERM, in training, validation and test) and resumed.
Every batch, every tensor after every step, and the final checkpoints are compared bit by bit; the
first difference is traced to its cause.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from cnn.config import Config, for_scratch
from cnn.drill.culprit import DrillRun, find_culprit, log_table
from cnn.drill.trace import Stop, Trace
from cnn.errors import Failed
from cnn.training.distributed import Group
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.logger import Log
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import NUMBERS, StopSignals, signals_deferred

logger = logging.getLogger(__name__)

STEPS = 6  # optimizer steps per epoch
EPOCHS = 2
KILL, TERM = signal.SIGKILL, signal.SIGTERM
# Where the run is stopped: epoch, share of its training batches (1: in validation), signal; the
# epoch after the last is the test. After SIGKILL the run resumes from the last step. After SIGTERM
# it takes the step and saves, so that no record shows what the step did: such a stop is the first
# one, when nothing can be lost yet, or comes after others that would have shown it.
STOPS = (
    (1, 0.3, TERM), (1, 0.7, KILL), (1, 1.0, KILL), (1, 1.0, TERM),
    (2, 0.0, TERM), (2, 0.7, KILL), (2, 1.0, TERM),
    (EPOCHS + 1, 0.0, KILL), (EPOCHS + 1, 0.0, TERM),
)  # fmt: skip
TIMEOUT = 600  # seconds for one process
TRACE = "trace.jsonl"

Train = Callable[..., None]

# A process is a fork of a server that has imported torch once. Forks share the seed of Python's
# hashes, which a set is ordered by: one of the runs is in an interpreter with another seed.
FRESH = multiprocessing.get_context("spawn")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "cnn.training.setup"])


def run_drill(cfg: Config, stop: StopSignals, train: Train) -> None:
    """Runs the drill and logs what it finds.

    Args:
        train: train.py's function of that name.

    Raises:
        Failed: the runs differ; the message names the culprit.
    """
    batches = STEPS * cfg.train.accumulate - (cfg.train.accumulate > 1)  # a short last step
    short = for_scratch(
        cfg,
        train={"epochs": EPOCHS},
        schedule={"warmup_epochs": min(cfg.schedule.warmup_epochs, 1)},
        checkpoint={"every_steps": 1},
    )
    with tempfile.TemporaryDirectory(prefix="drill_") as scratch:

        def run(name: str, stops: list[Stop], *, fresh: bool = False) -> DrillRun:
            stop.check()
            logger.info("%s ...", name)
            return _run(train, short, Path(scratch, name), batches, stops, fresh)

        unbroken = run("unbroken", [])
        number = 1 + max(r["batch"] for r in unbroken.records if r["part"] == "training")
        stops = [Stop((epoch, int(share * number)), by) for epoch, share, by in STOPS]
        runs, tested = {"again": run("unbroken again", [], fresh=True)}, "a second, unbroken run"
        culprit = find_culprit(short, batches, unbroken, runs["again"])
        if culprit is None:  # else a resume may be refused, with a message that says less
            runs["stopped"] = run(f"stopped {len(stops)} times and resumed", stops)
            tested = "the stopped run"
            culprit = find_culprit(short, batches, unbroken, runs["stopped"])
    log_table(unbroken, runs)
    if culprit is not None:
        raise Failed(f"drill: {tested} is not the same: {culprit}")
    logger.info("drill OK: identical, every batch and every bit; this run can be stopped anywhere")


def _run(
    train: Train, cfg: Config, folder: Path, max_batches: int, stops: list[Stop], fresh: bool
) -> DrillRun:
    """Trains in a process per stop and a last one; each resumes where the previous was stopped.

    Args:
        fresh: start new interpreters, not forks.
    """
    folder.mkdir()
    if fresh:  # a seed in the environment would be the same again
        os.environ.pop("PYTHONHASHSEED", None)
    records, starts = [], []
    for stop in [*stops, None]:
        starts.append(len(records))
        method = multiprocessing.get_start_method()  # which the run's own loaders would use
        process = (FRESH if fresh else CONTEXT).Process(
            target=_child, args=(train, cfg, folder, stop, max_batches, method)
        )
        try:
            resource_tracker.ensure_running()  # started below, it would unblock the signals
            with signals_deferred():  # of those that reach another thread
                _start(process)
            process.join(TIMEOUT)
        finally:
            hangs = process.exitcode is None
            _kill(process)
        if hangs:
            raise Failed(f"drill: a run did not end within {TIMEOUT} s")
        if process.exitcode != {None: 0, KILL: -KILL, TERM: 128 + TERM}[stop and stop.signal]:
            log = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise Failed(f"drill: the run itself failed:\n{log.strip()[-3000:]}")
        lines = (folder / TRACE).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    run = RunFolder(None, folder)
    checkpoints = {path.name: load_checkpoint(path) for path in (run.last, run.best)}
    return DrillRun(records, checkpoints, starts)


def _start(process: BaseProcess) -> None:
    """Starts a process with signals blocked: Ctrl-C reaches all processes of a terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(process: BaseProcess) -> None:
    """Kills a process and its loader processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it has no group of its own yet, or has ended
    process.join()


def _child(
    train: Train, cfg: Config, folder: Path, stop_at: Stop | None, max_batches: int, method: str
) -> None:
    """Trains from the latest checkpoint in the folder until the stop, or to the end."""
    from cnn import cli
    from cnn.training.resume import Checkpoint, latest_checkpoint

    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
    multiprocessing.set_start_method(method, force=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for reseed in (torch.seed, np.random.seed, random.seed):  # forks share the generators' states
        reseed()

    def resume(log: Log, stop: StopSignals) -> None:
        with RunFolder(None, folder, scratch=True) as run_folder:
            found = latest_checkpoint(run_folder)
            checkpoint = Checkpoint(*found, cfg) if found else None
            trace = Trace(folder / TRACE, stop_at)
            train(cfg, run_folder, log, stop, Group(stop=stop), checkpoint, max_batches, trace)

    sys.exit(cli.run_command(cli.Task(resume)))
