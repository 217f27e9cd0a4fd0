"""Text for a terminal: the columns that it takes, tables, and escapes for control characters.

A Chinese character takes two columns.
"""

import os
import sys
import unicodedata
from collections.abc import Sequence

LINES = "\n\t"  # control characters that this project's messages contain
MAX_NAME = 22  # the most columns that a class name takes


def display_width(text: str) -> int:
    """Returns the number of terminal columns that a text takes.

    A letter takes one column, a Chinese character two, and a combining accent none.
    """
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
        if unicodedata.category(letter) not in ("Mn", "Me", "Cf")  # they take no column
    )


def shorten_name(name: str) -> str:
    """Returns a class name on one line, in at most 22 terminal columns.

    A name that is too long is cut and ends with "…".
    """
    name = escape_unprintable(" ".join(name.split()))
    if display_width(name) <= MAX_NAME:
        return name
    while display_width(name) > MAX_NAME - 1:
        name = name[:-1]
    return name + "…"


def list_some(items: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """Returns the first items of a list, and how many more there are.

    Args:
        items: the items, such as names.
        most: the most items to list.
        between: the text between two items.
    """
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return between.join(items[:most]) + more


def pad(text: str, columns: int, *, right: bool = False) -> str:
    """Adds blanks to a text until the text takes the given number of columns.

    Args:
        text: the text. A text that is wide enough is returned unchanged.
        columns: the number of terminal columns.
        right: whether to add the blanks before the text, which aligns the text to the right.
    """
    blanks = " " * (columns - display_width(text))
    return blanks + text if right else text + blanks


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Returns the lines of a table with aligned columns.

    Two blanks separate neighbouring columns.

    Args:
        rows: the cells of each row. All rows have the same number of cells.
        right: the indices of the columns to align to the right, from 0.
    """
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(display_width, column))
        columns.append([pad(cell, width, right=number in right) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def escape_unprintable(text: str, keep: str = "") -> str:
    """Replaces the unprintable characters of a text with escape sequences.

    Unprintable characters, such as control characters, can occur in a class name or a file name.

    Args:
        text: the text.
        keep: the unprintable characters to leave unchanged, such as line ends.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def write_stdout(text: str) -> None:
    """Writes a text to stdout, above any progress bar.

    No line end is added. Unprintable characters except line ends and tabs are written as escape
    sequences.

    Raises:
        SystemExit: stdout is a pipe that the reading program has closed. The exit status is 141.
    """
    from tqdm import tqdm  # imported here: it takes a third of a refusal's time

    try:
        tqdm.write(escape_unprintable(text, keep=LINES), sys.stdout, end="")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # 128 + SIGPIPE, which signal lacks on Windows
