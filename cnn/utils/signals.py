"""Signals that ask a run to stop: it finishes what it is in the middle of, saves, and goes."""

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

# Ctrl-C, a scheduler's end, a scheduler's warning, a terminal closed or a connection lost.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has two

PARENT = "CNN_PARENT"  # environment variable: the read end of a pipe whose other end the parent has


class StopSignals:
    """Turns a signal into `Stopped`: at once before training, then between steps or in a wait.

    A second SIGINT leaves at once; what was last saved is whole.
    """

    installed: "StopSignals | None" = None

    def __init__(self, *, deferred: bool = False) -> None:
        self.received: int | None = None
        self.raised = False  # at once, in the middle of whatever it was
        self.deferred = deferred  # it waits until `check`
        self.alone = True  # else all processes of the run stop together, where they agree to
        self.settled = False  # how it ends is known, and no signal changes it any more
        self._process = os.getpid()

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise Refused("signals reach the main thread alone; call main() there, not in another")
        StopSignals.installed = self
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._tell_unraisable
        self._before = {
            number: signal.signal(number, self._handle)
            for number in NUMBERS
            if not _is_ignored_on_purpose(number)
        }

    def uninstall(self, *, is_last: bool = False) -> None:
        """Gives the signals back to who had them; at a process's end, to nobody."""
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_last else handler)

    def _tell_unraisable(self, given: "sys.UnraisableHookArgs") -> None:
        """Out of a `__del__` no Stopped comes, and no traceback of one: it waits until `check`."""
        if not isinstance(given.exc_value, Stopped):
            self._unraisable(given)

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """Signals end the process at once, as they would without this object."""
        self.uninstall()
        try:
            yield
        finally:
            self.install()

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.settled or os.getpid() != self._process:
            return  # too late; or a loader process just forked: the signal is for its parent
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            self.raised = True
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped if a signal has come; called where a run may be saved."""
        if self.alone:
            self._obey()

    def interruptible(self, act: Callable[[], T]) -> T:
        """What `act` gives, in which nothing is half done: a signal raises Stopped in its midst.

        So does one that has come before; and, after it, one that other code has caught.
        """
        before, self.deferred = self.deferred, False
        try:
            self._obey()
            given = act()
            self._obey()
            return given
        finally:
            self.deferred = before

    def _obey(self) -> None:
        if self.received is not None:
            raise Stopped(self.received)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Has a signal wait until the context ends."""
    stop = StopSignals.installed or StopSignals()
    before, stop.deferred = stop.deferred, True
    try:
        yield
    finally:
        stop.deferred = before
    if not before:
        stop._obey()


def stop_with_parent() -> None:
    """Has this process stopped by SIGTERM when its parent is gone, if the parent asks for that.

    However that ends, the kernel closes its end of the pipe, into which nothing is ever written.
    """

    def watch() -> None:
        os.read(pipe, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    if PARENT in os.environ:
        pipe = int(os.environ.pop(PARENT))  # not for what this process starts
        threading.Thread(target=watch, daemon=True).start()


def _is_ignored_on_purpose(number: int) -> bool:
    """nohup has a process ignore SIGHUP, so that it outlives its terminal."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def at_most(seconds: float, refusal: Exception) -> Iterator[None]:
    """Raises the refusal where what is within takes longer; in the main thread, and not on Windows."""
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: types.FrameType | None) -> None:
        raise refusal

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
