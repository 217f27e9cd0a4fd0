"""How the process keeps its memory."""

import ctypes

import numpy as np
import pytest

from cnn.utils import memory

resource = pytest.importorskip("resource")


def faults_of(act):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_used_again_and_not_asked_for_anew():
    memory.keep_freed_memory()

    def take():
        [np.ones(8_000_000, np.uint8) for _ in range(6)]  # 11,719 pages

    take()
    take()
    assert faults_of(lambda: [take() for _ in range(3)]) < 1_000


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
