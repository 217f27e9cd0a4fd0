"""Standard streams that a process was started without: a daemon's, pythonw's, those of `2>&-`."""

import os
import sys


def open_missing() -> None:
    """Has what is written to a closed stdout or stderr go nowhere; from stdin comes nothing.

    Else the next file to be opened, a checkpoint say, has the number into which libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
