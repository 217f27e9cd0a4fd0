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

    Only the other process logs an error message; this process logs none.
    """


class RunError(RuntimeError):
    """An error during the work, such as a full disk, that is reported without a traceback.

    The exit status is 1.
    """

    status = 1


class Failed(RunError):
    """An error after which the work cannot continue, such as a loss that is no longer finite."""


class DataFailed(RunError):
    """The failure to load a batch. The run saves its state and can be resumed."""


class ProcessLost(RunError):
    """The end of another process of a distributed run. This process cannot continue alone."""


class DatabaseFailed(RunError):
    """The failure of a sweep's database to answer for a minute. The stored results are kept."""


class Stopped(BaseException):
    """A request to stop that came as a signal, such as SIGINT.

    It is a BaseException, so that `except Exception` does not catch it. The exit status is 128 plus
    the number of the signal.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- caught before they end a run -------------------------------------------------------------


class InvalidValue(Exception):
    """A wrong value in a configuration or a checkpoint. The code that catches it adds the place.

    For a configuration, its message is the text that follows the key, such as ": expected a number,
    got x" or "[1].scale: missing". For a checkpoint, the message names the key itself.
    """


class BadImage(Exception):
    """An image that is missing, damaged or of a kind that cannot be used.

    The function `decode` of cnn.datasets.decode raises it with a message that does not name the
    file. The callers of `decode` add the path of the file.
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

    The description consists of the type, the first line of the message, and the place as FILE:LINE,
    such as "ValueError: no labels (loss.py:12)". Advice follows if memory, disk space, open files
    or threads seem to be exhausted.

    Args:
        error: an exception that was caught, so that it has a traceback. The place is the
            traceback's first line outside the package cnn, or its last line if there is none
            outside.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
