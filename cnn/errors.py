"""The exceptions that end a run or a script, each with its exit status.

Exit status 0 is done; 128 + N is stopped by signal N, after saving.
"""

import errno
import os
import re
import signal
import traceback


class Refused(ValueError):
    """Raised if what the user asks for cannot be done; says where, why and what to do."""

    status = 2


class RefusedElsewhere(Refused):
    """Raised if another process raised Refused and logged why."""


class RunError(RuntimeError):
    """Raised if something fails while running and the message needs no traceback."""

    status = 1


class Failed(RunError):
    """Raised if the run cannot continue."""


class DataFailed(RunError):
    """Raised if the next batch cannot be loaded; the run can be resumed afterwards."""


class ProcessLost(RunError):
    """Raised if another process of the run has died."""


class DatabaseFailed(RunError):
    """Raised if the database of a sweep does not answer; nothing is lost."""


class Stopped(BaseException):
    """Raised if a signal asked the run to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- caught before they end anything -------------------------------------------------------------


class InvalidValue(Exception):
    """Raised for a wrong value in the configuration; the message follows the key directly.

    For example ": expected a number, got x" or "[1].scale: missing".
    """


class BadImage(Exception):
    """Raised if a file is missing or is no whole image; `decode` raises it without the path."""


# -- errors of the user's own code ---------------------------------------------------------------

# Too little memory, disk space, files or threads: error numbers of the system, words of torch.
SCARCITIES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
SCARCE = re.compile("memory|MemoryError|EOFError|file <|open files|ancdata|thread|worker|AF_UNIX")
OURS = os.path.join(os.path.dirname(__file__), "")
ADVICE = "fewer data.num_workers need less (ulimit -n, ulimit -u, df /dev/shm, a short TMPDIR)"


def describe(error: Exception) -> str:
    """Returns an error of the user's own code as one line: type, message, place and advice.

    The place is the first line outside this package, or else the last line inside it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
