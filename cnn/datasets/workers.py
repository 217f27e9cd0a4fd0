"""Loader processes: deaf to signals, gone with the process that they load for."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

from cnn.utils import signals


def kill_workers() -> None:
    """Kills the loader processes of this one."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def ignore_end_of_workers() -> None:
    """Takes back torch's signal handler, which raises in the middle of a step when a worker dies.

    Its loader notices within 5 seconds too, where it waits for the batch.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def has_ended(worker: BaseProcess) -> bool:
    """Whether a loader process is gone."""
    worker.join(0.2)  # its pipe closes a moment before it is gone
    return worker.exitcode is not None


def ignore_signals(worker: int) -> None:
    """A signal to the whole group is for the main process, which needs its workers to save."""
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Has signals wait until the context ends."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
