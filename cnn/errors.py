"""The exceptions that end a run or a script, each with its exit status.

A script that succeeds exits with status 0. One that signal N stops exits with status 128 + N.
"""

import errno
import os
import re
import signal
import traceback


class Refused(ValueError):
    """A request of the user that cannot be fulfilled, such as a setting with a wrong value.

    The message says where the mistake is, what is wrong, and what to do. The exit status is 2.
    """

    status = 2


class RefusedElsewhere(Refused):
    """An error in another process of a distributed run, which raised `Refused` or `Failed`.

    The other process logs the error. This one ends without logging anything.
    """


class RunError(RuntimeError):
    """An error during the work, such as a full disk, that is reported without a traceback.

    The exit status is 1.
    """

    status = 1


class Failed(RunError):
    """An error after which the work cannot continue, such as a loss that is no longer finite."""


class DataFailed(RunError):
    """A batch that cannot be loaded; the run saves its state and can be resumed."""


class ProcessLost(RunError):
    """The end of another process of a distributed run, without which this one cannot continue."""


class DatabaseFailed(RunError):
    """A database of a sweep that has not answered for a minute; no stored result is lost."""


class Stopped(BaseException):
    """A request to stop that came as a signal, such as SIGINT.

    It is a BaseException, so that no `except Exception` catches it. The exit status is 128 plus the
    number of the signal.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- caught before they end a run -------------------------------------------------------------


class InvalidValue(Exception):
    """A wrong value in a configuration or a checkpoint; the caller turns it into a full message.

    For a configuration, the caller writes the key directly before the message, which is for
    example ": expected a number, got x" or "[1].scale: missing". For a checkpoint, the message
    itself begins with the key.
    """


class BadImage(Exception):
    """An image that is missing, damaged or of a kind that cannot be used.

    `decode` raises it with a message that does not name the file; its callers add the path.
    """


# -- errors of the user's own code ---------------------------------------------------------------

# Signs of too little memory, disk space, files or threads: the system's error numbers, and words in
# messages of torch and of the system.
SCARCITIES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
SCARCE = re.compile("memory|MemoryError|EOFError|file <|open files|ancdata|thread|worker|AF_UNIX")
OURS = os.path.join(os.path.dirname(__file__), "")
ADVICE = "fewer data.num_workers need less (ulimit -n, ulimit -u, df /dev/shm, a short TMPDIR)"


def describe(error: Exception) -> str:
    """Describes an exception that the user's own code raised, in one line.

    Args:
        error: an exception that was caught, so that it has a traceback.

    Returns:
        The type, the first line of the message, and the place as FILE:LINE. The place is the first
        line of the traceback that is outside this package, or else its last line. Advice follows if
        memory, disk space, file descriptors or threads seem to be exhausted.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
