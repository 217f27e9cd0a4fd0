"""Every exception that ends a run or a script, each with its exit status.

0 is done, and 128 + N stopped by signal N after saving.
"""

import errno
import os
import re
import signal
import traceback


class Refused(ValueError):
    """What the user asked for cannot be done; the message says where, why and what to do."""

    status = 2


class RefusedElsewhere(Refused):
    """Refused by another process, which has said why."""


class RunError(RuntimeError):
    """Something failed while running; the message has all that the user needs."""

    status = 1


class Failed(RunError):
    """The run cannot go on."""


class DataFailed(RunError):
    """The next batch cannot be had; the run is whole and can go on once its cause is mended."""


class ProcessLost(RunError):
    """Another process of the run is gone."""


class DatabaseFailed(RunError):
    """The database of a sweep does not answer; nothing is lost."""


class Stopped(BaseException):
    """A signal asked the run to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- taken care of before they end anything ------------------------------------------------------


class InvalidValue(Exception):
    """A wrong value in the configuration: what was expected and what came.

    Begins with the rest of the key, or with ': '.
    """


class BadImage(Exception):
    """An image that cannot be had: no image, not whole, gone. As `decode` raises it, without path."""


# -- other people's ------------------------------------------------------------------------------

# What this machine has too little of: as the system tells it, and as torch and Python do.
SCARCITIES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
SCARCE = re.compile("memory|MemoryError|EOFError|file <|open files|ancdata|thread|worker|AF_UNIX")
OURS = os.path.join(os.path.dirname(__file__), "")
ADVICE = "fewer data.num_workers need less (ulimit -n, ulimit -u, df /dev/shm, a short TMPDIR)"


def describe(error: Exception) -> str:
    """An error that the user's own code may have raised, in one line: what it is, where, what to do.

    The place is where our code called another's, or else the last line of ours.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
