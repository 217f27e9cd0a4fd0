"""Text for a terminal: columns, where a Chinese character takes two, and control characters."""

import os
import sys
import unicodedata
from collections.abc import Sequence

LINES = "\n\t"  # control characters that our own text contains
MAX_NAME = 22  # columns of a class name


def display_width(text: str) -> int:
    """Returns the number of columns that a text takes."""
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
        if unicodedata.category(letter) not in ("Mn", "Me", "Cf")  # combined with the letter before
    )


def shorten_name(name: str) -> str:
    """Returns a class name on one line, cut to 22 columns."""
    name = escape_unprintable(" ".join(name.split()))
    if display_width(name) <= MAX_NAME:
        return name
    while display_width(name) > MAX_NAME - 1:
        name = name[:-1]
    return name + "…"


def pad(text: str, columns: int, *, right: bool = False) -> str:
    """Fills a text up with blanks to a number of columns; `right` aligns it to the right."""
    blanks = " " * (columns - display_width(text))
    return blanks + text if right else text + blanks


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Returns a table as lines.

    Args:
        rows: of equally many cells.
        right: the numbers of the columns that are aligned to the right.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = [pad(cell, columns, right=number in right) for number, (cell, columns) in cells]
        lines.append("  ".join(padded).rstrip())
    return lines


def escape_unprintable(text: str, keep: str = "") -> str:
    """Replaces control characters and lone surrogates, which a name may contain, by their escapes.

    Args:
        keep: control characters of our own text, such as line ends.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def write_stdout(text: str) -> None:
    """Writes to stdout above a tqdm bar; exits with status 141 where the reader closed the pipe."""
    from tqdm import tqdm  # imported here: it takes a third of the time of a refusal

    try:
        tqdm.write(escape_unprintable(text, keep=LINES), sys.stdout, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, which signal lacks on Windows
