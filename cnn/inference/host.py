"""What a predictor does so that the program around it, its host, is not disturbed.

The random generators of random, numpy and torch belong to all threads of a process. Restoring them
after a prediction would give other threads the same numbers again. Therefore only a model that
draws random numbers touches them, and only one such model at a time.

The worker threads of torch do not survive a fork. A process that was forked after torch has used
its threads waits for them forever, unless it calls torch from another thread.
"""

import contextlib
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LOADING = "cnn-load"  # the beginning of the name of a thread that loads a model

# In a forked process, `thread` does what the main thread cannot do.
_process = SimpleNamespace(lock=threading.RLock(), thread=None)


def _after_fork() -> None:
    _process.lock, _process.thread = threading.RLock(), ThreadPoolExecutor(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def generators_borrowed(device: torch.device | None = None) -> Iterator[None]:
    """Lets a `with` block use the global random generators, and restores them at its end.

    The generators are those of random, of numpy and of torch on the CPU. Only one thread at a time
    is in such a block. A thread that draws without such a block gets repeated numbers.

    Args:
        device: a CUDA device, which becomes the current device of the block. The generator of this
            device is restored, too. None or another device for a block that uses only the CPU.
    """
    is_cuda = device is not None and device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process.lock)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng([device] if is_cuda else []))
        if is_cuda:
            stack.enter_context(torch.cuda.device(device))
        yield


class OwnGenerator(TorchDispatchMode):
    """Lets operations of torch draw from a generator of its own, during a `with` block.

    Only the operations of the current thread are affected, and only those with an argument for a
    generator, which all functions of torch.nn.init use.
    """

    _generator = torch.Generator()  # of all threads, since nobody needs its numbers again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Calls an operation of torch, with the generator if the operation takes one."""
        kwargs = dict(kwargs or {})
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def in_new_thread(function: Callable[[], Any]) -> Any:
    """Calls a function in a new thread, and returns the result.

    A new thread has none of the settings that torch keeps for each thread, such as a default
    device, autocast or inference mode. The threads that torch starts for the function end with the
    new thread. A process can therefore be forked after the call.

    A call within such a call, as of a model that loads other models, stays in the same thread.
    """
    if threading.current_thread().name.startswith(LOADING):
        return function()
    with ThreadPoolExecutor(1, LOADING) as thread:
        return thread.submit(function).result()


def import_torchvision() -> None:
    """Imports torchvision, and restores the filters for warnings that the import changes."""
    if "torchvision" not in sys.modules:
        with _process.lock, warnings.catch_warnings():
            import torchvision  # noqa: F401


def call_after_fork(function: Callable[[], Any]) -> Any:
    """Calls a function that uses the threads of torch, and returns the result.

    In the main thread of a forked process, the function is called in another thread. Without this,
    the function could wait forever for threads that exist only in the parent process.
    """
    if _process.thread and threading.current_thread() is threading.main_thread():
        return _process.thread.submit(function).result()
    return function()
