"""Signals that ask a run to stop: it finishes what it is in the middle of, saves, and goes."""

import os
import signal
import types

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C, a scheduler's end, a scheduler's warning


class Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Turns a signal into `Stopped`: at once before training, between two steps during it.

    A second SIGINT leaves at once; what was last saved is whole.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self._process = os.getpid()

    def install(self) -> None:
        self._before = {
            number: signal.signal(number, self._handle)
            for name in NAMES
            if (number := getattr(signal, name, None)) is not None
        }

    def uninstall(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process just forked: the signal is for its parent
        if self.received == number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped if a signal has come; called where a run may be saved."""
        if self.received is not None:
            raise Stopped(self.received)
