"""How the process keeps its memory."""

import ctypes
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from cnn.utils import memory

ROOT = Path(__file__).resolve().parents[1]
resource = pytest.importorskip("resource")


def faults_of(act):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def take():
    [np.ones(8_000_000, np.uint8) for _ in range(6)]  # 11,719 pages


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")


@glibc
def test_freed_memory_is_used_again_and_not_asked_for_anew():
    memory.keep_freed_memory()
    take()
    take()
    assert faults_of(lambda: [take() for _ in range(3)]) < 1_000


# Each of three equal batches takes tensors of two sizes, one after the other; with the first come
# kernels, which stay. Prints how many bytes malloc has then.
A_TRAINING = """
import ctypes, numpy as np
from cnn.utils import memory
memory.keep_freed_memory()
kernels = []
for batch in {batches}:
    tensors = []
    for number in range(6):
        tensors.append(np.ones(6_000_000, np.uint8))
        if len(kernels) < 6:
            kernels.append(bytes(200_000))
    tensors = None
    tensors = [np.ones(12_000_000, np.uint8) for number in range(3)]
    tensors = None
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = memory._Usage
print(libc.mallinfo2().arena)
"""


@glibc
def test_what_is_made_with_the_first_batch_and_stays_leaves_no_holes():
    taken = []
    for batches in ("[[[1]]] * 3", "memory.Heap().follow('train', [[[1]]] * 3)"):
        command = [sys.executable, "-c", A_TRAINING.format(batches=batches)]
        taken.append(int(subprocess.check_output(command, cwd=ROOT)))
    assert taken[0] > 70_000_000  # 36 of each, beside each other
    assert taken[1] < 50_000_000


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_freed_memory_is_given_back_before_steps_of_another_kind():
    memory.keep_freed_memory()
    take()
    before = resident()
    next(memory.Heap().follow("evaluate", [[[1]]]))
    assert resident() < before - 30_000_000


def test_no_batch_is_kept_while_the_next_one_is_made():
    alive = []

    def batches():
        for _ in range(3):
            alive.append(weakref.ref(batch := np.ones((3, 1))))
            yield batch
            del batch
            assert alive[-1]() is None

    for batch in memory.Heap().follow("train", batches()):
        assert alive[-1]() is batch
        del batch


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
    assert list(memory.Heap().follow("train", [[[1]], [[1]]])) == [[[1]], [[1]]]
