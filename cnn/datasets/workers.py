"""Worker processes of a DataLoader: they ignore signals and end with the process that started them.

While the main process waits for a batch, it logs a warning if the batch takes long, and raises an
error if a worker dies.
"""

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

from cnn.datasets.decode import silence_pillow
from cnn.errors import DataFailed, Stopped, describe
from cnn.utils import signals

logger = logging.getLogger(__name__)

WARN_EVERY = 30  # seconds of waiting for a batch


class PickledBatch:
    """A pickled batch on the way from a worker process to the main process.

    The tensors of the batch are in shared memory. If shared memory runs out, creating this object
    raises an error in the worker process.

    Args:
        batch: ((images, labels), messages about images that were left out).
    """

    def __init__(self, batch: Any):
        # If torch pickled the batch, an error would be lost. The main process would wait forever.
        self._data = bytes(ForkingPickler.dumps(batch))

    def unpickle(self) -> Any:
        """Returns the original batch."""
        return ForkingPickler.loads(self._data)

    def pin_memory(self) -> Any:
        """Returns the original batch, with the tensors in pinned memory.

        The DataLoader calls this method in a thread of the main process.
        """
        (images, labels), left_out = self.unpickle()
        return (images.pin_memory(), labels.pin_memory()), left_out


def pickle_batch(batch: Any) -> PickledBatch | DataFailed:
    """Pickles a batch in a worker process.

    Args:
        batch: the batch. If the batch could not be made, a `DataFailed` error.

    Returns:
        The pickled batch. If `batch` is a `DataFailed` error, the same error. If the batch cannot
        be pickled, a new `DataFailed` error.
    """
    try:
        return batch if isinstance(batch, DataFailed) else PickledBatch(batch)
    except Exception as error:  # noqa: BLE001  any error has to reach the main process
        return data_failure(error)


def receive_batches(loader: DataLoader, start: int, source: str) -> Iterator[Any]:
    """Yields the batches of a DataLoader, and warns every 30 s during a wait.

    Args:
        loader: the DataLoader. A `PickledBatch` from the DataLoader is unpickled. A `DataFailed`
            error from the DataLoader is raised.
        start: number of the first batch in the epoch, counted from 1, for the warning.
        source: where the batches belong, such as "epoch 3", for the warning.

    Raises:
        DataFailed: a batch cannot be loaded, or a worker has died.
    """
    awaited, since, ended, workers = start, time.monotonic(), threading.Event(), []
    source += " from the loader processes" if loader.num_workers else ""

    def warn() -> None:  # runs in a thread, since the main thread waits inside torch
        warned_at = 0.0
        while not ended.wait(min(WARN_EVERY, 1)):
            waited = time.monotonic() - since if awaited is not None else 0.0
            warned_at = min(warned_at, waited)  # a shorter wait means that another batch is awaited
            if waited >= warned_at + WARN_EVERY:
                warned_at = waited
                logger.warning("waiting for batch %d of %s: %.0f s", awaited, source, waited)

    try:
        threading.Thread(target=warn, daemon=True).start()
        batches = enumerate(_start_workers(loader), start)
        workers = multiprocessing.active_children()
        for number, batch in batches:
            batch = batch.unpickle() if isinstance(batch, PickledBatch) else batch
            if isinstance(batch, DataFailed):
                raise batch
            awaited = None
            yield batch
            del batch  # frees its memory before another one is made
            awaited, since = number + 1, time.monotonic()
    except (DataFailed, Stopped):
        kill_workers()  # a worker can hang while it reads a file
        raise
    except Exception as error:  # noqa: BLE001  torch fails in many ways
        failure = data_failure(error, workers=workers)
        kill_workers()
        # The traceback keeps half-made objects of torch, whose file descriptors saving can need;
        # freeing them makes torch print errors that nobody can use.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None
        sys.unraisablehook = hook
        raise failure from None
    finally:
        ended.set()


def _start_workers(loader: DataLoader) -> Iterator[Any]:
    """Starts the worker processes of a DataLoader and returns the DataLoader's iterator.

    If workers are forked, signals are handled only after the workers have been started. Otherwise,
    a forked worker would run the signal handlers of this process. If workers are spawned, signals
    are handled at once.

    torch's handler of the signal SIGCHLD is removed. The handler raises an error in the middle of a
    step when a worker dies. A DataLoader that waits for a batch notices a dead worker without the
    handler, within 5 seconds. Outside the main thread, the handler stays.
    """
    forked = multiprocessing.get_start_method() == "fork"
    with signals.signals_blocked() if forked else contextlib.nullcontext():
        try:
            return iter(loader)
        finally:
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def data_failure(
    error: Exception, what: str = "the next batch", workers: Sequence = ()
) -> DataFailed:
    """Returns an error that says why an image or a batch cannot be loaded.

    If a worker has died, the error says how the worker died. In this case, `error` and `what` are
    not used.

    Args:
        error: the exception that was raised while loading.
        what: the name of an image that cannot be loaded, or "the next batch".
        workers: the worker processes, or an empty list.
    """
    for worker in workers:
        worker.join(0.2)  # a worker's pipe closes a moment before the worker ends
    codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
    if not codes:
        return DataFailed(f"{what}: {describe(error)}")
    ending = "a loader process was killed" if codes[0] < 0 else "a loader process has ended"
    return DataFailed(
        f"{ending} (exit code {codes[0]}), most often because the memory ran out, or /dev/shm;"
        f" fewer data.num_workers need less of it"
    )


def kill_workers() -> None:
    """Kills the DataLoader workers that this process started.

    Every worker gets SIGKILL, since workers ignore SIGTERM.
    """
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def init_worker(worker: int) -> None:  # noqa: ARG001  torch passes it
    """Makes a worker process ignore signals and print neither tracebacks nor warnings of Pillow.

    The main process handles signals and reports errors.

    Args:
        worker: index of the worker, which the DataLoader passes. The index is not used.
    """
    # Threads of a worker that share tensors would print the same error again and again.
    sys.excepthook = lambda *_: None
    silence_pillow()
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)
