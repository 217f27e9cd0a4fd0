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
    """An error that ends this process because another process of the distributed run has failed.

    The other process logs its own error, a `Refused` or a `Failed`. This process logs nothing.
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
    """The end of another process of a distributed run; this process cannot continue alone."""


class DatabaseFailed(RunError):
    """A sweep's database that has not answered for a minute; the results stored in it are kept."""


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

    For a configuration, the message is what follows the key, such as ": expected a number, got x"
    or "[1].scale: missing". The caller writes the key directly before it. For a checkpoint, the
    message itself names the key.
    """


class BadImage(Exception):
    """An image that is missing, damaged or of a kind that cannot be used.

    The function `decode` of cnn.datasets.decode raises it with a message that does not name the
    file. The callers of `decode` add the path.
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
        The type, the first line of the message, and the place as FILE:LINE, such as "ValueError: no
        labels (loss.py:12)". The place is the first line of the traceback that is outside the
        package cnn, or the traceback's last line if all are inside. If memory, disk space, file
        descriptors or threads seem to be exhausted, advice follows.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
