"""Every exception that ends a run or a script, each with its exit status.

0 is done, and 128 + N stopped by signal N after saving.
"""

import signal


class Refused(ValueError):
    """What the user asked for cannot be done; the message says where, why and what to do."""

    status = 2


class Elsewhere(Refused):
    """Refused by another process, which has said why."""


class RunError(RuntimeError):
    """Something failed while running; the message has all that the user needs."""

    status = 1


class Failed(RunError):
    """The run cannot go on."""


class DataFailed(RunError):
    """The next batch cannot be had; the run is whole and can go on once its cause is mended."""


class Lost(RunError):
    """Another process of the run is gone."""


class DatabaseFailed(RunError):
    """The database of a sweep does not answer; nothing is lost."""


class Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- taken care of before they end anything ------------------------------------------------------


class Mistake(Exception):
    """A wrong value in the configuration: what was expected and what came.

    Begins with the rest of the key, or with ': '.
    """


class BadImage(Exception):
    """An image that cannot be had: no image, not whole, gone. As `decode` raises it, without path."""
