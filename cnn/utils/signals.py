"""Signals that ask a run to stop. The run finishes the current step, saves, and exits."""

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

# Sent by Ctrl-C, by a scheduler at the time limit and before it, and when a terminal is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows lacks two

# An environment variable: the descriptor of the read end of a pipe, whose other end the parent has.
PARENT = "CNN_PARENT"


class StopSignals:
    """Handlers that raise `Stopped` when a signal asks the run to stop.

    They raise it at once or, while `deferred` is true, when `check` is called. A second SIGINT ends
    the process at once; the latest checkpoint is intact.

    Args:
        deferred: the initial value of the attribute `deferred`.

    Attributes:
        installed: the object whose handlers are installed in this process, or None.
        received: the number of the latest signal; None if there was no signal.
        was_raised: whether a handler has raised `Stopped`, which can happen in the middle of any
            code.
        deferred: whether a signal has no effect until `check` is called.
        is_single_process: whether the run has only one process. If it has several, `check` does
            nothing, because all processes have to stop after the same step.
        is_outcome_known: whether the exit status is decided. Signals are ignored from then on.
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
        """Installs the handlers in place of the current ones.

        SIGHUP stays ignored if it was ignored before, as it is under nohup.

        Raises:
            Refused: this is not the main thread, which is the only one that signals reach.
        """
        if threading.current_thread() is not threading.main_thread():
            raise Refused("signals reach the main thread alone; call main() there, not in another")
        StopSignals.installed = self
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._drop_unraisable
        nohup = {n for n in NUMBERS if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN}
        numbers = [number for number in NUMBERS if number not in nohup]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def uninstall(self, *, is_last: bool = False) -> None:
        """Restores the signal handlers that `install` replaced.

        Args:
            is_last: whether the process is about to exit. If so, the earlier handlers are not
                restored, and the signals are ignored from then on.
        """
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_last else handler)

    def _drop_unraisable(self, failure: "sys.UnraisableHookArgs") -> None:
        """Ignores a `Stopped` that was raised in a `__del__` method, and prints no traceback.

        The next call of `check` can raise `Stopped` again. Any other exception is passed to the
        hook that was installed before.

        Args:
            failure: the exception in a `__del__` method, as Python passes it to
                `sys.unraisablehook`.
        """
        if not isinstance(failure.exc_value, Stopped):
            self._unraisable(failure)

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Restores, within a `with` block, the signal handlers that `install` replaced."""
        self.uninstall()
        try:
            yield
        finally:
            self.install()

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.is_outcome_known or os.getpid() != self._process:
            # It is too late, or this is a loader process that was just forked. The parent of that
            # process receives the signal too.
            return
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            self.was_raised = True
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped if a signal has come and this process is the only one of the run.

        In a run of several processes, this method does nothing.
        """
        if self.is_single_process:
            self.raise_received()

    def interruptible(self, act: Callable[[], T]) -> T:
        """Calls a function that a signal may interrupt anywhere, and returns its result.

        Args:
            act: a function without arguments.

        Raises:
            Stopped: a signal came before or during the call. It is raised even if the function
                itself caught the exception `Stopped`.
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
        """Raises Stopped if this process has received a signal."""
        if self.received is not None:
            raise Stopped(self.received)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Makes signals wait until the end of the `with` block.

    If a signal comes during the block, Stopped is raised at its end. If signals were already
    deferred before the block, nothing is raised, and they stay deferred.
    """
    stop = StopSignals.installed or StopSignals()
    before, stop.deferred = stop.deferred, True
    try:
        yield
    finally:
        stop.deferred = before
    if not before:
        stop.raise_received()


def stop_with_parent() -> None:
    """Starts a thread that sends this process SIGTERM when its parent process ends.

    The parent has to open a pipe, to keep its write end open, and to set the environment variable
    `CNN_PARENT` to the file descriptor of the read end. Without the variable, no thread is started.
    The thread waits at the read end. When the parent ends, even if it is killed, the kernel closes
    the write end, and the thread wakes up.
    """

    def watch() -> None:
        os.read(pipe, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    if PARENT in os.environ:
        pipe = int(os.environ.pop(PARENT))  # child processes shall not inherit it
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raises an error if the `with` block takes longer than a number of seconds.

    There is no limit on Windows, and none outside of the main thread.

    Args:
        seconds: the number of seconds.
        error: the exception to raise.
    """
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
