"""How the process keeps its memory."""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch", bound=tuple)  # images first

# Of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

# Bytes. Larger blocks are few; kept, they would leave holes that the next ones do not fit into:
# 15 % more memory for 5 % of the time.
LARGEST_KEPT = 20 * 2**20
LARGEST_AT_FIRST = 2**20  # smaller than the tensors that matter, larger than what stays
LEAST_RETURNED = 8 * 2**20  # less is not worth the milliseconds, where an epoch has no more than 50


def keep_freed_memory(largest: int = LARGEST_KEPT) -> None:
    """Has malloc keep the memory of tensors that are freed, for the next step's.

    By itself glibc gives it back to the system and asks for it anew at every step, and the system
    hands it out page by page, zeroed: a sixth of a training step on the CPU. Where the C library is
    another one, nothing is changed.

    Args:
        largest: bytes; a larger block is mapped for itself, and given back when it is freed.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, largest)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _Usage(ctypes.Structure):
    """mallinfo2 of glibc's malloc.h; fordblks are the bytes that are kept, and free."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def return_freed_memory() -> None:
    """Gives the system back what malloc keeps, if that is much. Takes 10 ms for 100 MB."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Usage
        if libc.mallinfo2().fordblks > LEAST_RETURNED:
            libc.malloc_trim(0)


class Heap:
    """Keeps the tensors of training and evaluation together, without holes between them.

    What stays for good must not come to lie between tensors that are freed: the next ones do not fit
    into what is left. That is what kernels need, which are made with the first batch of each size;
    the tensors of that batch are mapped apart. And training's tensors do not fit into the holes that
    an evaluation's left: what is free is given back before either. Together a tenth of the process's
    memory.
    """

    def __init__(self) -> None:
        self._met: set[tuple[str, int]] = set()
        self._largest: int | None = None

    def follow(self, kind: str, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Passes batches of one kind on, "train" or "evaluate"."""
        return_freed_memory()
        for batch in batches:
            size = (kind, len(batch[0]))
            largest = LARGEST_KEPT if size in self._met else LARGEST_AT_FIRST
            if largest != self._largest:
                keep_freed_memory(largest)
            self._met.add(size)
            self._largest = largest
            yield batch
            del batch  # before another one is made
