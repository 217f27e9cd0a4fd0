"""Signals that ask a run to stop: it finishes the current step, saves, and exits."""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import TypeVar

from cnn.errors import Refused, Stopped

T = TypeVar("T")

# Ctrl-C; a scheduler's time limit; its warning before that; a closed terminal or lost connection.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows lacks two

PARENT = "CNN_PARENT"  # environment variable: the read end of a pipe that the parent holds open


class StopSignals:
    """Signal handlers that raise `Stopped`: immediately, or where they are deferred, in `check`.

    A second SIGINT ends the process immediately; the latest checkpoint is intact.

    Attributes:
        installed: the handlers that are in force in this process.
        received: the number of the signal that has come, or None.
        was_raised: whether the handler raised `Stopped`, in the middle of any other code.
        deferred: whether a signal waits until `check`.
        is_single_process: whether `check` raises; of several processes, all stop together.
        is_outcome_known: whether the exit status is decided, so that signals are ignored.
    """

    installed: "StopSignals | None" = None

    def __init__(self, *, deferred: bool = False) -> None:
        self.received: int | None = None
        self.was_raised = False
        self.deferred = deferred
        self.is_single_process = True
        self.is_outcome_known = False
        self._process = os.getpid()

    def install(self) -> None:
        """Takes the signals over; raises Refused outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            raise Refused("signals reach the main thread alone; call main() there, not in another")
        StopSignals.installed = self
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._drop_unraisable
        nohup = {n for n in NUMBERS if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN}
        numbers = [number for number in NUMBERS if number not in nohup]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def uninstall(self, *, is_last: bool = False) -> None:
        """Restores the handlers of before; with `is_last`, at exit, ignores signals instead."""
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_last else handler)

    def _drop_unraisable(self, failure: "sys.UnraisableHookArgs") -> None:
        """Prints no traceback of a `Stopped` raised in a `__del__`; `check` will raise it again."""
        if not isinstance(failure.exc_value, Stopped):
            self._unraisable(failure)

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Restores the handlers of before within the context."""
        self.uninstall()
        try:
            yield
        finally:
            self.install()

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.is_outcome_known or os.getpid() != self._process:
            return  # too late; or a loader process has just been forked: its parent has it too
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            self.was_raised = True
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped if a signal has come, in a run of a single process."""
        if self.is_single_process:
            self.raise_received()

    def interruptible(self, act: Callable[[], T]) -> T:
        """Returns the result of a function that a signal may interrupt anywhere.

        Raises:
            Stopped: a signal came before it, within it, or within it and other code caught that.
        """
        before, self.deferred = self.deferred, False
        try:
            self.raise_received()
            result = act()
            self.raise_received()
            return result
        finally:
            self.deferred = before

    def raise_received(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defers signals until the context ends, where `Stopped` is raised."""
    stop = StopSignals.installed or StopSignals()
    before, stop.deferred = stop.deferred, True
    try:
        yield
    finally:
        stop.deferred = before
    if not before:
        stop.raise_received()


def stop_with_parent() -> None:
    """Sends this process SIGTERM when its parent ends, if the parent has set `CNN_PARENT`.

    Nothing is ever written into the pipe; the kernel closes the parent's end however it ends.
    """

    def watch() -> None:
        os.read(pipe, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    if PARENT in os.environ:
        pipe = int(os.environ.pop(PARENT))  # not for processes that this one starts
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raises an error when the context takes longer; only in the main thread, not on Windows."""
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
