"""How far an epoch is: a bar on a terminal, elsewhere a line now and then."""

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
    """Passes the items on and shows how many have come: steps or batches, `done` before."""
    on_terminal = sys.stderr.isatty() and find_launch().is_rank0
    began = told = time.monotonic()
    with tqdm(desc=label, total=total, initial=done, leave=False, disable=not on_terminal) as bar:
        for number, item in enumerate(items, start=1):
            yield item
            bar.update()
            now = time.monotonic()
            if not on_terminal and now - told >= every_seconds and done + number < total:
                told = now
                left = (now - began) / number * (total - done - number)
                logger.info("%s  %d/%d  %s left", label, done + number, total, duration(left))


def duration(seconds: float) -> str:
    """Seconds as 7s, 3:05 or 2:03:05."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if whole >= 60 else f"{seconds:.1f}s"
