"""One trial of a sweep: a run of train.py in a process of its own, followed epoch by epoch."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cnn import cli
from cnn.errors import Refused
from cnn.records.history import read_history
from cnn.records.run_record import RunRecord, read_run
from cnn.sweeps.locks import SharedLock
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import PARENT, StopSignals

logger = logging.getLogger(__name__)

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
PAUSE = 0.2  # seconds between two looks at the run
MAX_KILLED = 3  # times that a trial goes on by itself after a signal that was not ours

COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"


@dataclass(frozen=True)
class TrialResult:
    state: str  # COMPLETE, PRUNED, FAILED
    value: float | None = None  # of the monitored metric, the best epoch's
    epoch: int | None = None  # the best; of a pruned one, the latest
    reason: str = ""  # of a failure


class Epochs:
    """The epochs of a run, as its history.csv tells of them."""

    def __init__(self, run: str, monitor: str):
        self.path, self.monitor = RunFolder(run).logs.history, monitor
        self._stamp: tuple[int, int] | None = None
        self.seen = 0

    def new(self) -> Iterator[tuple[int, float]]:
        """Those that have been added since: epoch, and metric where it is defined."""
        try:
            status = self.path.stat()
        except OSError:  # there is none yet
            return
        stamp = status.st_ino, status.st_mtime_ns  # each epoch makes a new file under the name
        if stamp == self._stamp:
            return
        self._stamp = stamp
        for row in read_history(self.path)[self.seen :]:
            self.seen += 1
            value = row.get(self.monitor)
            if value is not None:
                yield int(row["epoch"]), value


def run_trial(
    run: str,
    words: list[str],
    monitor: str,
    report: Callable[[int, float], bool],
    lock: SharedLock,
    output: Path,
    stop: StopSignals,
) -> TrialResult:
    """Trains the run, or goes on with it, until it has ended in one way or another.

    Args:
        words: of train.py, after `--resume`.
        report: takes each new epoch and its metric; says whether the run is to be stopped.
        lock: that the run holds as long as it lives.
        output: a file for all that it says.

    Raises:
        Refused: train.py refuses the run.
        Stopped: a signal came to us; the run has had it too, and is saved.
    """
    for _ in range(MAX_KILLED):
        begin = output.stat().st_size if output.exists() else 0
        epochs = Epochs(run, monitor)
        status, pruned = _train(words, epochs, report, lock, output, stop)
        said = _last_words(output, begin)
        if status == cli.DONE:
            return _result(read_run(f"logs/{run}"), report)
        if status == cli.FAILED:
            return TrialResult(FAILED, reason=said)
        stop.check()
        if status == cli.REFUSED:
            raise Refused(said)
        if pruned:
            return TrialResult(PRUNED, epoch=epochs.seen)
        name = signal_name(status)
        logger.warning("%s was ended by %s, and goes on from where it was saved", run, name)
    return TrialResult(FAILED, reason=f"ended by {name}, {MAX_KILLED} times; {said}")


def _train(
    words: list[str],
    epochs: Epochs,
    report: Callable[[int, float], bool],
    lock: SharedLock,
    output: Path,
    stop: StopSignals,
) -> tuple[int, bool]:
    """train.py to its end: its exit status, and whether it was we who ended it as not worth more.

    It has a session of its own, so that Ctrl-C in a terminal reaches it once, from here; and a pipe
    from here, so that it saves and ends too where this process is killed.
    """
    watched, held = os.pipe()
    command = [sys.executable, os.path.relpath(TRAIN), "--resume", *words]
    with open(output, "ab") as file:
        process = subprocess.Popen(
            *(command,),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.descriptor, watched],
            env={**os.environ, PARENT: str(watched)},
        )
    os.close(watched)
    passed_on, pruned = None, False
    try:
        while True:
            try:
                return process.wait(PAUSE), pruned
            except subprocess.TimeoutExpired:
                pass
            if stop.received != passed_on:
                passed_on = stop.received
                process.send_signal(passed_on)
            elif not pruned and any(report(epoch, value) for epoch, value in epochs.new()):
                pruned = True
                process.terminate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        os.close(held)


def _result(record: RunRecord, report: Callable[[int, float], bool]) -> TrialResult:
    """What a run came to that is done; what it has not told yet is told, but no longer weighed."""
    for row in record.history:
        if row.get(record.monitor) is not None:
            report(int(row["epoch"]), row[record.monitor])
    best = record.best()
    if not best:
        return TrialResult(FAILED, reason=f"{record.monitor} is undefined in every epoch")
    return TrialResult(COMPLETE, best[record.monitor], int(best["epoch"]))


def is_finished(run: str) -> bool:
    """Whether the run has come to its end, test and all."""
    try:
        return read_run(f"logs/{run}").status == "finished"
    except Refused:
        return False


def signal_name(status: int) -> str:
    """The signal that an exit status tells of, Python's -N or a shell's 128 + N."""
    number = -status if status < 0 else status - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"exit status {status}"


def _last_words(output: Path, begin: int) -> str:
    """Why a run has ended, of what it has said from there on."""
    with open(output, "rb") as file:
        file.seek(begin)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        lines = lines[errors[-1] :]
    if any(line.startswith("Traceback ") for line in lines):
        lines = lines[-1:]
    return "\n".join(lines[-10:]).removeprefix("error: ")
