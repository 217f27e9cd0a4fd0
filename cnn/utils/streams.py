"""Standard streams that are missing, as in a daemon, under pythonw or after `2>&-`."""

import os
import sys


def open_missing_streams() -> None:
    """Opens the null device in place of each closed standard stream.

    Otherwise, the next file to be opened would get the file descriptor of the closed stream. Output
    of libraries would then go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # `number` is then the lowest free descriptor, which os.open takes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)


def discard_unwritable_stderr() -> None:
    """Discards what stderr holds if it cannot be written, as on a full disk or a closed terminal.

    Otherwise, Python tries to write it once more at the end of the process, and exits with 120.
    """
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except ValueError:  # code of the user has closed it
        pass
