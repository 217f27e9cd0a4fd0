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
from cnn.utils.signals import NUMBERS, StopSignals, signals_blocked

logger = logging.getLogger(__name__)

STEPS = 6  # optimizer steps per epoch
EPOCHS = 2
KILL, TERM = signal.SIGKILL, signal.SIGTERM
# Where the run is stopped: the epoch, the fraction of its training batches (1: in the validation)
# and the signal. The test counts as the epoch after the last one. After SIGKILL, the run resumes
# from the last step. After SIGTERM, it takes one more step and saves, and no record shows what this
# step did. Such a stop is therefore the first one, when nothing can be lost yet, or comes after
# stops that would have shown an error.
STOPS = (
    (1, 0.3, TERM), (1, 0.7, KILL), (1, 1.0, KILL), (1, 1.0, TERM),
    (2, 0.0, TERM), (2, 0.7, KILL), (2, 1.0, TERM),
    (EPOCHS + 1, 0.0, KILL), (EPOCHS + 1, 0.0, TERM),
)  # fmt: skip
TIMEOUT = 600  # seconds for one process
TRACE = "trace.jsonl"

Train = Callable[..., None]

# A process is a fork of a server that has imported torch once. Forks share the seed of Python's
# hashes, which determines the order of a set. One run therefore has new interpreters, which have
# another seed.
FRESH = multiprocessing.get_context("spawn")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "cnn.training.setup"])


def run_drill(cfg: Config, stop: StopSignals, train: Train) -> None:
    """Trains a short run three times, and logs whether the results are identical.

    The first two runs are unbroken. The third run is stopped by signals and resumed. If the first
    two runs differ, the third run is left out. All runs write to a temporary folder.

    Args:
        cfg: the settings of the user's run. The short runs train fewer steps.
        stop: the signal handlers of this process.
        train: the function `train` of train.py.

    Raises:
        Failed: the runs differ, or a run fails. The message names the cause.
        Stopped: this process has received a signal.
    """
    batches = STEPS * cfg.train.accumulate - (cfg.train.accumulate > 1)  # the last step is shorter
    rise = cfg.schedule.warmup_steps and min(cfg.schedule.warmup_steps, STEPS)
    short = for_scratch(
        cfg,
        train={"epochs": EPOCHS},
        schedule={"warmup_epochs": min(cfg.schedule.warmup_epochs, 1), "warmup_steps": rise},
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
    """Trains a run in one process after another.

    A signal stops every process except the last process. The next process resumes from the latest
    checkpoint.

    Args:
        train: the function `train` of train.py.
        cfg: the settings of the run.
        folder: the folder of the run, which is created.
        max_batches: the largest number of batches per split.
        stops: where each process except the last process is stopped; [] for an unbroken run.
        fresh: whether each process is a new Python interpreter. If False, each process is forked.

    Returns:
        The records and the checkpoints of the run.

    Raises:
        Failed: a process fails or does not end within 600 seconds.
    """
    folder.mkdir()
    if fresh:  # new interpreters would use the same seed again
        os.environ.pop("PYTHONHASHSEED", None)
    records, starts = [], []
    for stop in [*stops, None]:
        starts.append(len(records))
        method = multiprocessing.get_start_method()  # which the run's own loaders would use
        process = (FRESH if fresh else CONTEXT).Process(
            target=_child, args=(train, cfg, folder, stop, max_batches, method)
        )
        try:
            resource_tracker.ensure_running()  # its start inside the block would unblock signals
            with signals_blocked():  # Ctrl-C would end the child before it has left the session
                process.start()
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


def _kill(process: BaseProcess) -> None:
    """Kills a process and its DataLoader workers, and waits for its end.

    Args:
        process: the process to kill, which may have ended already.
    """
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it has no group of its own yet, or has ended
    process.join()


def _child(
    train: Train, cfg: Config, folder: Path, stop_at: Stop | None, max_batches: int, method: str
) -> None:
    """Trains a run from the run's latest checkpoint, and ends this process.

    This function is the main function of a child process. The output of the process is appended to
    the file output.txt in `folder`.

    Args:
        train: the function `train` of train.py.
        cfg: the settings of the run.
        folder: the folder of the run. If the folder contains no checkpoint, the run starts from
            scratch.
        stop_at: the batch before which a signal stops the process; None to train to the end.
        max_batches: the largest number of batches per split.
        method: the start method of the DataLoader workers, such as "fork".
    """
    from cnn import cli
    from cnn.training.resume import Checkpoint, latest_checkpoint

    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # they are blocked at first
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
