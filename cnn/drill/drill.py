"""The drill: is *your* run, with your data, model and settings, one that can be stopped anywhere?

`python train.py --drill [settings]` trains a short stretch three times in a scratch folder: unbroken,
unbroken again, and stopped (SIGKILL and SIGTERM, in training, validation and test) and resumed. Every
batch, every tensor after every step, and the final checkpoints are compared bit by bit; the first
difference is traced to where it comes from.
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
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from cnn.config import Config, for_scratch, load_config, to_yaml
from cnn.drill.culprit import DrillRun, Record, find_culprit, log_table
from cnn.drill.trace import Stop, Trace
from cnn.errors import Failed
from cnn.training.distributed import Group
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.logger import Log
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import NUMBERS, StopSignals, signals_deferred

logger = logging.getLogger(__name__)

STEPS = 6  # optimizer steps an epoch of the stretch
EPOCHS = 2
KILL, TERM = signal.SIGKILL, signal.SIGTERM
# Where the run is stopped: epoch, and share of its training batches (1: in validation); the epoch after
# the last is the test. Killed, it goes on from the last step; told to stop, it takes the step and saves:
# no record tells of that step from that process, so that such a stop is the first one, when nothing can
# have been lost yet, or comes after others that would have shown it.
STOPS = (
    *((1, 0.3, TERM), (1, 0.7, KILL), (1, 1.0, KILL), (1, 1.0, TERM), (2, 0.0, TERM)),
    *((2, 0.7, KILL), (2, 1.0, TERM), (EPOCHS + 1, 0.0, KILL), (EPOCHS + 1, 0.0, TERM)),
)
TIMEOUT = 600  # seconds for one process

Train = Callable[..., None]

# Each process is a fork of a server that has imported torch once. A fork inherits what it hashes by,
# so that one way through is in an interpreter of its own.
FRESH = multiprocessing.get_context("spawn")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "cnn.training.setup"])


def run_drill(cfg: Config, stop: StopSignals, train: Train) -> None:
    """Holds the drill and says what it found.

    Args:
        train: the story of a run, train.py's.

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
        settings = Path(scratch, "settings.yaml")
        settings.write_text(to_yaml(short), encoding="utf-8")

        def through(name: str, stops: list[Stop], *, fresh: bool = False) -> DrillRun:
            stop.check()
            logger.info("%s ...", name)
            return _through(train, settings, Path(scratch, name), batches, stops, fresh)

        first = through("unbroken", [])
        number = 1 + max(r["batch"] for r in first.records if r["part"] == "training")
        stops = [Stop((epoch, int(share * number)), by) for epoch, share, by in STOPS]
        again = through("unbroken again", [], fresh=True)
        culprit = find_culprit(short, batches, first, again)
        if culprit is not None:  # then a resume may be refused, and tell less
            log_table(first, {"again": again})
            raise Failed(f"drill: a second, unbroken run is not the same: {culprit}")
        stopped = through(f"stopped {len(stops)} times and resumed", stops)
    log_table(first, {"again": again, "stopped": stopped})
    culprit = find_culprit(short, batches, first, stopped)
    if culprit is not None:
        raise Failed(f"drill: the stopped run is not the same: {culprit}")
    logger.info("drill OK: identical, every batch and every bit; this run can be stopped anywhere")


# -- one way through the stretch ---------------------------------------------------------------


def _through(
    train: Train, settings: Path, folder: Path, max_batches: int, stops: list[Stop], fresh: bool
) -> DrillRun:
    """Runs the stretch in processes of its own, each but the last stopped at its place.

    Args:
        fresh: in new interpreters that hash in another way, not in forks.
    """
    folder.mkdir()
    trace = folder / "trace.jsonl"
    trace.touch()
    starts = []
    for stop in [*stops, None]:
        starts.append(len(_read(trace)))
        method = multiprocessing.get_start_method()  # that the run's own loaders would use
        process = (FRESH if fresh else CONTEXT).Process(
            target=_child, args=(train, settings, folder, trace, stop, max_batches, method)
        )
        try:
            with _other_hashes() if fresh else contextlib.nullcontext():
                resource_tracker.ensure_running()  # it would let signals through again
                with signals_deferred():  # those that come to another thread
                    _start(process)
            process.join(TIMEOUT)
        finally:
            hangs = process.exitcode is None
            _kill(process)  # its workers too
        if hangs:
            raise Failed(f"drill: a run did not end within {TIMEOUT} s")
        by = stop and stop.signal
        if process.exitcode != (-KILL if by == KILL else 128 + TERM if by else 0):
            log = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise Failed(f"drill: the run itself failed:\n{log.strip()[-3000:]}")
    run = RunFolder(None, folder)
    checkpoints = {path.name: load_checkpoint(path) for path in (run.last, run.best)}
    return DrillRun(_read(trace), checkpoints, starts)


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


def _start(process: BaseProcess) -> None:
    """Starts it, deaf to signals until it is ready: Ctrl-C goes to a terminal's whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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


def _child(
    train: Train,
    settings: Path,
    folder: Path,
    trace: Path,
    stop_at: Stop | None,
    max_batches: int,
    method: str,
) -> None:
    """The process that is stopped: goes on from what it finds in the folder."""
    from cnn import cli
    from cnn.training.resume import Checkpoint, latest_checkpoint

    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
    multiprocessing.set_start_method(method, force=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cfg, _ = load_config(settings)
    for seed_by_chance in (torch.seed, np.random.seed, random.seed):  # as a new process finds them
        seed_by_chance()

    def act(log: Log, stop: StopSignals) -> None:
        with RunFolder(None, folder, scratch=True) as run_folder:
            found = latest_checkpoint(run_folder)
            point = Checkpoint(*found, cfg) if found else None
            trace_to = Trace(trace, stop_at)
            train(cfg, run_folder, log, stop, Group(stop=stop), point, max_batches, trace_to)

    sys.exit(cli.run_command(cli.Task(act)))
