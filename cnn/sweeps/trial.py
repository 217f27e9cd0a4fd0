"""Trains one trial of a sweep in a process of train.py, and reports the epochs of that process."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import TrialState

from cnn import cli
from cnn.errors import Refused
from cnn.metrics.scores import Metrics
from cnn.records.history import read_history
from cnn.records.run_record import read_run
from cnn.sweeps.study import TakenTrial, TrialResult
from cnn.utils.run_folder import RunFolder
from cnn.utils.signals import PARENT, StopSignals

logger = logging.getLogger(__name__)

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
PAUSE = 0.2  # seconds between two checks of the process
MAX_KILLED = 3  # times that a training process may be killed by a signal that sweep.py did not send


def run_trial(trial: TakenTrial, stop: StopSignals) -> TrialResult:
    """Trains or resumes a trial until the trial is complete, pruned or failed.

    A signal that sweep.py did not send can end the training process. In this case, a new process
    resumes from the last checkpoint. After the third such signal, the trial has failed.

    Args:
        trial: the trial, whose method `start` has been called.
        stop: the signal handlers of this process.

    Returns:
        The result of the trial.

    Raises:
        Refused: train.py refused the settings.
        Stopped: this process received a signal. The training process has saved and exited.
    """
    # If true, the pruning of the trial was interrupted.
    if trial.should_prune() and read_run(f"logs/{trial.run}").status != "finished":
        return TrialResult(TrialState.PRUNED, epoch=trial.epoch)
    for _ in range(MAX_KILLED):
        start = trial.output.stat().st_size if trial.output.exists() else 0
        status, is_pruned = _train(trial, stop)
        message = _last_message(trial.output, start)
        if status == cli.DONE:
            return _read_result(trial)
        if status == cli.FAILED:
            return TrialResult(TrialState.FAIL, reason=message)
        stop.check()
        if status == cli.REFUSED:
            raise Refused(message)
        if is_pruned:
            return TrialResult(TrialState.PRUNED, epoch=trial.epoch)
        name = signal_name(status)
        logger.warning("%s was ended by %s; resuming its last checkpoint", trial.run, name)
    reason = f"ended by {name}, {MAX_KILLED} times; {message}"
    return TrialResult(TrialState.FAIL, reason=reason)


def _train(trial: TakenTrial, stop: StopSignals) -> tuple[int, bool]:
    """Runs train.py for a trial and waits for the end of the training process.

    The training process has a session of its own, so that Ctrl-C in the terminal does not reach the
    training process. sweep.py passes its own signals on. If sweep.py is killed, a pipe between the
    two processes closes. The training process then saves and exits.

    Args:
        trial: the trial.
        stop: the signal handlers of this process.

    Returns:
        A pair. The first item is the exit status of the training process, or -N if signal N killed
        the training process. The second item is whether the training process was stopped to prune
        the trial.
    """
    read_end, write_end = os.pipe()
    with open(trial.output, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, os.path.relpath(TRAIN), "--resume", *trial.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[trial.lock.fileno(), read_end],
            env={**os.environ, PARENT: str(read_end)},
        )
    os.close(read_end)
    history = RunFolder(trial.run).logs.history
    passed_on, is_pruned = None, False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(PAUSE), is_pruned
            if stop.received != passed_on:
                passed_on = stop.received
                process.send_signal(passed_on)
            elif not is_pruned and any(report_epochs(trial, read_history(history))):
                is_pruned = True
                process.terminate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        os.close(write_end)


def report_epochs(trial: TakenTrial, history: list[Metrics]) -> Iterator[bool]:
    """Reports the metric of each epoch of a trial to the database.

    The function is a generator. An epoch is reported only when its item is taken. Epochs without
    the metric are skipped.

    Args:
        trial: the trial, whose `monitor` is the name of the metric.
        history: the rows of history.csv, one per epoch.

    Yields:
        Whether the trial should be pruned, once after each report.
    """
    for row in history:
        if row.get(trial.monitor) is not None:
            yield trial.report(int(row["epoch"]), row[trial.monitor])


def _read_result(trial: TakenTrial) -> TrialResult:
    """Reads the result of a trial whose run is finished.

    Epochs that were not reported to the database before are reported first.

    Args:
        trial: the trial.

    Returns:
        The result. The trial has failed if the monitored metric is undefined in every epoch.
    """
    record = read_run(f"logs/{trial.run}")
    list(report_epochs(trial, record.history))  # reports all, even if one says prune
    best = record.best()
    if not best:
        return TrialResult(TrialState.FAIL, reason=f"{trial.monitor} is undefined in every epoch")
    return TrialResult(TrialState.COMPLETE, best[trial.monitor], int(best["epoch"]))


def signal_name(status: int) -> str:
    """Returns the name of the signal that ended a process, such as "SIGTERM".

    Args:
        status: the exit status of the process. The status is -N if signal N killed the process, and
            128 + N if the process handled signal N and then exited.

    Returns:
        The name; "exit status STATUS" if no signal has the number N.
    """
    number = -status if status < 0 else status - 128
    names = {one.value: one.name for one in signal.Signals}
    return names.get(number, f"exit status {status}")


def _last_message(output: Path, start: int) -> str:
    """Returns the last error message in the output of a training process.

    Args:
        output: the path of the file with the output of all training processes of the trial.
        start: the position in bytes at which the output of the latest process begins.

    Returns:
        The message without the word "error: " in front. A message with a traceback is cut to the
        last line. If there is no message, the last lines of the output are returned. The text has
        at most ten lines.
    """
    with open(output, "rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace").strip()
    lines = f"\n{text}".rpartition("\nerror: ")[2].strip().splitlines()  # all if there is none
    if any(line.startswith("Traceback ") for line in lines):
        lines = lines[-1:]
    return "\n".join(lines[-10:])
