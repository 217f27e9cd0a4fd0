"""Processes of sweep.py that can be killed: at a write, trainings pretended, or as a user has them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import optuna
from conftest import ROOT
from optuna.trial import TrialState
from processes import CONTEXT

import sweep
from cnn.records import run_record
from cnn.sweeps import study as study_module
from cnn.sweeps import trial as trial_module
from cnn.sweeps.study import TrialResult
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import NUMBERS

# All that a sweep writes down, between which it may be killed.
WRITES = [
    (optuna.storages.RDBStorage, "create_new_study"),
    (optuna.storages.RDBStorage, "create_new_trial"),
    (optuna.storages.RDBStorage, "set_study_user_attr"),
    (optuna.storages.RDBStorage, "set_trial_param"),
    (optuna.storages.RDBStorage, "set_trial_user_attr"),
    (optuna.storages.RDBStorage, "set_trial_state_values"),
    (optuna.storages.RDBStorage, "set_trial_intermediate_value"),
    (study_module, "write_text"),
    (RunFolder, "archive"),
    (trial_module, "run_trial"),
]


def pretend(trial, stop) -> TrialResult:
    """In the place of a training: notes that it was begun, and what with."""
    with open("begun.txt", "a") as file:
        file.write(json.dumps([trial.run, trial.arguments()]) + "\n")
    for epoch in (1, 2):
        trial.report(epoch, 1.0)
    return TrialResult(TrialState.COMPLETE, abs(trial.values["optim.lr"] - 0.1), 2)


# In the place of train.py: notes that it was begun, and the second time fails at once; the first time
# it trains until it is told to stop, and takes its time to save: until somebody waits for that.
STAND_IN = """
import json, signal, sys, time
from pathlib import Path
from cnn import cli
from cnn.errors import Failed, Stopped

def act(log, stop):
    signal.alarm(20)  # rather than to live on
    run = sys.argv[-1].partition("=")[2]
    with open("begun.txt", "a") as file:
        file.write(json.dumps([run, sys.argv[1:]]) + "\\n")
    if Path("saved").exists():
        raise Failed("enough")
    try:
        time.sleep(1000)
    except Stopped:
        log = Path("logs/sweeps/small/sweep.log")
        while "waiting for the run of trial 0" not in log.read_text():
            time.sleep(0.02)
        Path("saved").touch()
        raise

sys.exit(cli.main(lambda argv: cli.Task(act, module="json"), None))
"""


def hold(
    folder: Path,
    words: list[str],
    dies_at: int | None,
    script: Path | None = None,
) -> None:
    """A process that sweeps, and dies at its n-th write: 2n before, 2n+1 after.

    Args:
        script: in the place of train.py; without one, trainings are pretended.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)  # see processes.py
    signal.alarm(60)  # rather than to hang
    os.chdir(folder)
    study_module.PAUSE = 0.02
    if script is None:
        trial_module.run_trial = pretend
    else:
        trial_module.TRAIN = script
    left = [dies_at]

    def deadly(original):
        def write(*args, **keywords):
            for after in (False, True):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if left[0] is not None:
                    left[0] -= 1
                if not after:
                    result = original(*args, **keywords)
            return result

        return write

    for owner, name in WRITES:
        setattr(owner, name, deadly(getattr(owner, name)))
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        os._exit(sweep.main(["small.yaml", *words]))


def hold_one_after_the_other(folder: Path, deaths: Iterable[int], results: Connection) -> None:
    """A process that has all ready and forks: one sweeps and dies, then the next, until one is done.

    It sends the exit statuses.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage("sqlite://")  # makes SQLAlchemy's classes ready
    optuna.create_study(storage=storage)
    storage.engine.dispose()
    statuses = []
    for dies_at in deaths:
        process = os.fork()
        if process == 0:
            hold(folder, [], dies_at)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        if statuses[-1] != -signal.SIGKILL:
            break
    results.send(statuses)


def sweeping(*words: str, dies_at: int | None = None, folder: Path | None = None, **options):
    where = folder or Path.cwd()
    process = CONTEXT.Process(target=hold, args=(where, [*words], dies_at), kwargs=options)
    process.start()
    return process


class Sweeping:
    """sweep.py as a process that can be killed."""

    def __init__(self, *words: str):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "sweep.py"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            self.lines += iter(lines.readline, "")

    def trial(self) -> int | None:
        """The trial that it is at."""
        at = None
        for line in list(self.lines):
            if begun := re.match(r"trial (\d+) (starts|resumes): ", line):
                at = int(begun[1])
            elif re.match(r"trial (\d+): ", line):
                at = None
        return at

    def wait_for_epochs(self, number: int, name: str) -> int:
        """Waits until it is within a trial that has been trained for some epochs; gives which."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            at = self.trial()
            if at is not None and count_epochs(f"{name}_{at:04}") >= number:
                return at
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def kill(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(60)

    def wait(self) -> str:
        """Waits for its end; gives what it has said."""
        self.process.wait(300)
        self.reader.join()
        return "".join(self.lines)


def count_epochs(name: str) -> int:
    try:
        return len(run_record.read_history(Path("logs", name, "history.csv")))
    except OSError:
        return 0
