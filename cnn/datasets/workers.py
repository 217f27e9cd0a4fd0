"""Loader processes: deaf to signals, gone with the process that they load for, missed when late."""

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import DataLoader

from cnn.errors import DataFailed, Stopped, describe
from cnn.utils import signals

logger = logging.getLogger(__name__)

TELL_EVERY = 30  # seconds of waiting for a batch


class Parcel:
    """A batch on its way out of a loader process: pickled, its tensors in shared memory.

    torch would do that in a thread beside the process's work. What goes wrong there, for want of
    shared memory or of descriptors, is printed, and the batch never comes.
    """

    def __init__(self, batch: Any):
        self._data = bytes(ForkingPickler.dumps(batch))

    def open(self) -> Any:
        return ForkingPickler.loads(self._data)

    def pin_memory(self) -> Any:
        """Called by torch in a thread of the process that loads, which reads ahead for a GPU."""
        (images, labels), left_out = self.open()
        return (images.pin_memory(), labels.pin_memory()), left_out


def packed(batch: Any) -> Parcel | DataFailed:
    """What a loader process sends: a batch, or why there is none."""
    try:
        return batch if isinstance(batch, DataFailed) else Parcel(batch)
    except Exception as error:  # noqa: BLE001  whatever it is, the run is to hear of it
        return failed(error)


def receive_batches(loader: DataLoader, start: int, what: str) -> Iterator[Any]:
    """Passes the loader's batches on, unpacked; tells every so often which one is waited for.

    Args:
        start: the number of the first.
        what: they are of.

    Raises:
        DataFailed: given in the place of a batch, or because there is none.
    """
    awaited, since, ended, workers = start, time.monotonic(), threading.Event(), []
    what += " from the loader processes" if loader.num_workers else ""

    def tell() -> None:  # in a thread: the wait is inside of torch
        told = 0.0
        while not ended.wait(min(TELL_EVERY, 1)):
            waited = time.monotonic() - since if awaited is not None else 0
            told = min(told, waited)  # less: of another batch
            if waited >= told + TELL_EVERY:
                told = waited
                logger.warning("waiting for batch %d of %s: %.0f s", awaited, what, waited)

    try:
        threading.Thread(target=tell, daemon=True).start()
        batches = enumerate(_begun(loader), start)
        workers = multiprocessing.active_children()
        for number, batch in batches:
            batch = batch.open() if isinstance(batch, Parcel) else batch
            if isinstance(batch, DataFailed):
                raise batch
            awaited = None
            yield batch
            del batch  # before another one is made
            awaited, since = number + 1, time.monotonic()
    except (DataFailed, Stopped):
        kill_workers()  # they may never come back from what they read
        raise
    except Exception as error:  # noqa: BLE001  torch has many ways to fail
        told = failed(error, workers=workers)
        kill_workers()
        # It holds what torch has half made, and so descriptors that saving needs; torch trips over it.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None
        sys.unraisablehook = hook
        raise told from None
    finally:
        ended.set()


def _begun(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches, its processes started.

    Where they are forked, signals wait until they are deaf to them. Where they are new interpreters,
    a signal has to end the wait for one that is dead and will never take its data.
    """
    forked = multiprocessing.get_start_method() == "fork"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS) if forked else None
    try:  # the mask is this thread's; what comes to another one is held back too
        with signals.signals_deferred() if forked else contextlib.nullcontext():
            return iter(loader)
    finally:
        ignore_end_of_workers()
        if forked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def failed(error: Exception, what: str = "the next batch", workers: Sequence = ()) -> DataFailed:
    """Why an image or a batch is not to be had: what was noticed of it, or how a worker ended."""
    for worker in workers:
        worker.join(0.2)  # its pipe closes a moment before it is gone
    ended = [worker.exitcode for worker in workers if worker.exitcode is not None]
    if not ended:
        return DataFailed(f"{what}: {describe(error)}")
    what = "a loader process was killed" if ended[0] < 0 else "a loader process has ended"
    return DataFailed(
        f"{what} (exit code {ended[0]}), most often because the memory ran out, or /dev/shm; fewer"
        f" data.num_workers need less of it"
    )


def kill_workers() -> None:
    """Kills the loader processes of this one.

    Asked to end by a SIGTERM, they would ignore it, and be waited for.
    """
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def ignore_end_of_workers() -> None:
    """Takes back torch's signal handler, which raises in the middle of a step when a worker dies.

    Its loader notices within 5 seconds too, where it waits for the batch.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def begin_worker(worker: int) -> None:
    """A signal to the whole group is for the main process; what fails here is told by it too."""
    sys.excepthook = lambda *_: None  # of threads that share tensors, again and again
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
