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
    """Signal handlers that stop a run by raising the exception `Stopped`.

    A handler raises `Stopped` at once, unless `deferred` is true. While `deferred` is true, only
    the method `check` raises `Stopped`. A second SIGINT ends the process at once.

    Args:
        deferred: the initial value of the attribute `deferred`.

    Attributes:
        installed: the object whose handlers were installed last; None if there is none.
        received: the number of the latest signal; None if there was no signal.
        was_raised: whether a handler has raised `Stopped`, possibly in the middle of other code.
        deferred: whether a signal has no effect until `check` is called.
        is_single_process: whether the run has only one process. With several processes, `check`
            does nothing, because all processes have to stop after the same step.
        is_outcome_known: whether the exit status is decided. If so, signals are ignored.
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
        """Installs the handlers of this object in place of the current handlers.

        If SIGHUP was ignored before, as under nohup, SIGHUP stays ignored.

        Raises:
            Refused: this is not the main thread. Signals reach only the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            raise Refused("signals reach the main thread alone; call main() there, not in another")
        StopSignals.installed = self
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._drop_unraisable
        nohup = {n for n in NUMBERS if n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN}
        numbers = [number for number in NUMBERS if number not in nohup]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def uninstall(self, *, is_last: bool = False) -> None:
        """Restores the signal handlers that were in place before `install`.

        Args:
            is_last: whether the process is about to exit. If so, the signals are ignored from then
                on, and no signal handler is restored.
        """
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_last else handler)

    def _drop_unraisable(self, failure: "sys.UnraisableHookArgs") -> None:
        """Ignores the exception `Stopped` from a `__del__` method, and prints no traceback.

        Any other exception is passed to the hook that was installed before.

        Args:
            failure: the exception from the `__del__` method, as passed to `sys.unraisablehook`.
        """
        if not isinstance(failure.exc_value, Stopped):
            self._unraisable(failure)

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Restores the earlier signal handlers during a `with` block.

        The handlers of this object are installed again at the end of the block.
        """
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
        """Raises Stopped if this process has received a signal.

        In a run of several processes, the method does nothing.
        """
        if self.is_single_process:
            self.raise_received()

    def interruptible(self, act: Callable[[], T]) -> T:
        """Calls a function that signals may interrupt at any point.

        Args:
            act: a function without arguments.

        Returns:
            The result of the function.

        Raises:
            Stopped: a signal came before or during the call. Stopped is raised even if the function
                has caught a first Stopped.
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

    If a signal comes during the block, Stopped is raised at the end of the block. If signals were
    already deferred before the block, signals stay deferred, and nothing is raised.
    """
    stop = StopSignals.installed or StopSignals()
    before, stop.deferred = stop.deferred, True
    try:
        yield
    finally:
        stop.deferred = before
    if not before:
        stop.raise_received()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Makes signals wait until the end of the `with` block, in new processes too.

    A process that is started in the block begins with blocked signals, and runs no signal handler
    of this process. Stopped is raised as by `signals_deferred`.
    """
    with signals_deferred():  # signals can reach another thread, which does not block them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_with_parent() -> None:
    """Makes this process receive SIGTERM when the parent process ends.

    The parent process has to open a pipe and to keep the write end open. The environment variable
    CNN_PARENT has to contain the file descriptor of the read end. Without the variable, the
    function does nothing. A parent process that is killed counts as ended, too.
    """

    def watch() -> None:
        os.read(pipe, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    if PARENT in os.environ:
        pipe = int(os.environ.pop(PARENT))  # child processes shall not inherit it
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raises an error if the `with` block takes too long.

    There is no limit on Windows, and no limit outside of the main thread.

    Args:
        seconds: the longest time that the block may take.
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
