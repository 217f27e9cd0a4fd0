"""Text on a terminal: in columns, where a Chinese letter is as wide as two others; past a bar."""

import os
import sys
import unicodedata
from collections.abc import Sequence

LINES = "\n\t"  # what of our own text is not printable
MAX_NAME = 22  # columns of a class name


def width(text: str) -> int:
    """Columns that the text takes."""
    if text.isascii():
        return len(text)
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
        if unicodedata.category(letter) not in ("Mn", "Me", "Cf")  # accents on the letter before
    )


def shortened(name: str) -> str:
    """A class name on one line, at most 22 columns wide."""
    name = printable(" ".join(name.split()))
    if width(name) <= MAX_NAME:
        return name
    while width(name) > MAX_NAME - 1:
        name = name[:-1]
    return name + "…"


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """The text, filled up with blanks to so many columns."""
    blanks = " " * (columns - width(text))
    return blanks + text if right else text + blanks


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """A line for each row, its cells below those of the others.

    Args:
        right: the columns whose cells end below each other: figures.
    """
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            padded(cell, columns, right=number in right)
            for number, (cell, columns) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def printable(text: str, kept: str = "") -> str:
    """The text for a terminal: what would steer it, or is no character at all, as its code.

    Args:
        kept: of that, what is ours and not from names that are data: line ends.
    """
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def write_stdout(text: str) -> None:
    """Writes to stdout, past a bar; ends quietly, as other programs do, where nobody reads on."""
    from tqdm import tqdm  # a third of the time that a typo is answered in

    try:
        tqdm.write(printable(text, kept=LINES), sys.stdout, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, which Windows has not
