"""The exceptions that end a run or a script, each with its exit status.

A script that succeeds exits with status 0. One that signal N stops exits with status 128 + N.
"""

import errno
import os
import re
import signal
import traceback


class Refused(ValueError):
    """A request of the user that cannot be fulfilled, such as a wrong setting.

    The message says where the mistake is, what is wrong, and what to do. The exit status is 2.
    """

    status = 2


class RefusedElsewhere(Refused):
    """An error in another process of a distributed run, which ends this process.

    The other process logs an error message. This process logs none.
    """


class RunError(RuntimeError):
    """An error during the work, such as a full disk.

    The error is reported without a traceback. The exit status is 1.
    """

    status = 1


class Failed(RunError):
    """An error that makes further work impossible, such as a loss of NaN."""


class DataFailed(RunError):
    """The failure to load a batch of images.

    The run saves its state before it ends, and can be resumed.
    """


class Stopped(BaseException):
    """A request to stop the process, sent as a signal such as SIGINT.

    The class inherits from BaseException, so that `except Exception` does not catch a Stopped. The
    exit status is 128 plus the number of the signal.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.status = number, 128 + number


# -- caught before they end a run -------------------------------------------------------------


class InvalidValue(Exception):
    """A wrong value in a configuration or a checkpoint.

    The code that catches the error puts the place of the value in front of the message. In a
    configuration, the place includes the key. So the message has only the text after the key, such
    as ": expected a number, got x" or "[1].scale: missing". In a checkpoint, the place is the file,
    and the message begins with the key.
    """


class BadImage(ValueError):
    """An image that is missing, damaged or of a kind that cannot be used.

    The function `decode` of cnn.datasets.decode raises this exception. The message does not name
    the file. The callers of `decode` add the path of the file to the message.
    """


# -- notes -------------------------------------------------------------------------------------


def add_note(error: BaseException, note: str) -> None:
    """Adds a line of text to an exception, as its method of that name does from Python 3.11."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]


# -- errors of the user's own code ---------------------------------------------------------------

# Signs of too little memory, disk space, files or threads: the system's error numbers, and words in
# messages of torch and of the system.
SCARCITIES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
SCARCE = re.compile(
    "memory|MemoryError|EOFError|BrokenPipe|file <|open files|ancdata|thread|worker|AF_UNIX"
)
OURS = os.path.join(os.path.dirname(__file__), "")
ADVICE = "fewer data.num_workers need less (ulimit -n, ulimit -u, df /dev/shm, a short TMPDIR)"


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message; the exception's type if there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(error: Exception) -> str:
    """Describes an exception of the user's own code in one line.

    The line contains the type, the first line of the message, and the place. An example is
    "ValueError: no labels (loss.py:12)". Advice follows if memory, disk space, open files or
    threads seem to be exhausted.

    The place is the first line of the traceback outside the package cnn. If all lines are inside
    the package, the place is the last line.

    Args:
        error: an exception that was raised and caught.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in frames if not frame.filename.startswith(OURS)), frames[-1])
    words = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
    scarce = getattr(error, "errno", None) in SCARCITIES or SCARCE.search(words)
    words += f" ({place.filename.removeprefix(os.getcwd() + os.sep)}:{place.lineno})"
    return f"{words}; {ADVICE}" if scarce else words
