"""The progress of an epoch: a bar on a terminal, and otherwise a log line from time to time."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from cnn.utils.launch import find_launch

logger = logging.getLogger(__name__)

T = TypeVar("T")


def show_progress(
    items: Iterable[T], label: str, total: int, done: int = 0, every_seconds: float = 30.0
) -> Iterator[T]:
    """Yields the items, and shows how many items have been taken.

    If stderr is a terminal, rank 0 shows a bar. Otherwise, log lines show the progress.

    Args:
        items: the steps or batches that remain to be taken.
        label: the text before the numbers, such as "epoch 3/10".
        total: the number of all items, with the items that were taken in an earlier process.
        done: the number of items that were taken in an earlier process; 0 if nothing is resumed.
        every_seconds: the shortest time between two log lines.
    """
    on_terminal = sys.stderr.isatty() and find_launch().is_rank0
    start = logged = time.monotonic()
    with tqdm(desc=label, total=total, initial=done, leave=False, disable=not on_terminal) as bar:
        for number, item in enumerate(items, start=1):
            yield item
            bar.update()
            now = time.monotonic()
            if not on_terminal and now - logged >= every_seconds and done + number < total:
                logged = now
                left = (now - start) / number * (total - done - number)
                position = f"{label}  {done + number}/{total}"
                logger.info("%s  %s left", position, format_duration(left))


def format_duration(seconds: float) -> str:
    """Formats a duration for a log or a table.

    Returns:
        A text such as "7.0s" for less than a minute, "3:05" for 3 minutes and 5 seconds, or
        "2:03:05" for 2 hours, 3 minutes and 5 seconds.
    """
    if round(seconds) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
