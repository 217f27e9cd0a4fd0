"""How the process keeps its memory."""

import ctypes
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
