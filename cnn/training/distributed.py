"""One run in several processes, started by torchrun: what they exchange, and where they agree.

Every process holds the whole model (DistributedDataParallel; Li et al., VLDB 2020) and computes its
share of every batch. With one process, all of this does nothing.
"""

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cnn.errors import DataFailed, Failed, Refused, RefusedElsewhere, Stopped, first_line
from cnn.metrics.running import RunningMetrics
from cnn.utils.launch import Launch, find_launch
from cnn.utils.module_state import load_state
from cnn.utils.signals import StopSignals

T = TypeVar("T")

# How long a process waits for the others before it gives up: within a step, and while the first
# process of a machine decodes a large set of images.
STEP_TIMEOUT = datetime.timedelta(minutes=10)
BUILD_TIMEOUT = datetime.timedelta(days=1)


class Group:
    """The processes that train one model together.

    Without arguments, the group is a single process.

    Args:
        launch: the rank of this process and the number of processes. None means a single process.
        stop: the signal handlers of this process. A group of several processes must have signal
            handlers. If None, no signal interrupts the wait for a batch.

    Attributes:
        rank: the index of this process, from 0 to size - 1.
        size: the number of processes.
        is_rank0: whether this process has rank 0. Only the process with rank 0 logs and writes
            files.
        key: a part of the seed of every training step. The key is () for rank 0, and (rank,) for
            every other rank. The processes thus draw different random numbers.
    """

    def __init__(self, launch: Launch | None = None, stop: StopSignals | None = None):
        self.launch, self.stop = launch or Launch(), stop or StopSignals()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.is_rank0 = self.launch.is_rank0
        self.key = (self.rank,) if self.rank else ()
        self._launcher = os.getppid()
        self._patient: dist.ProcessGroup | None = None  # for exchanges that may take long

    def connect(self) -> None:
        """Connects this process to the other processes.

        The call waits for the other processes. In a single process, nothing is done.

        Raises:
            Refused: the other processes cannot be reached or do not connect in time.
        """
        if self.size == 1:
            return
        self.stop.is_single_process = False
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            with self.stop.default_handlers():  # Python handlers do not run while torch waits
                store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
                store = dist.PrefixStore(_attempt(), store)
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT
                )
                self._patient = dist.new_group(backend="gloo", timeout=BUILD_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            what = f"the {self.size} processes did not meet at {address}"
            raise Refused(f"torchrun: {what}: {first_line(error)}") from None

    def disconnect(self) -> None:
        """Closes the connections when all processes have called this method.

        In a single process, nothing is done.
        """
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()

    # -- before and after training -------------------------------------------------------------

    def barrier(self) -> None:
        """Waits until all processes have called this method."""
        if self.size > 1:
            dist.barrier(self._patient)

    def broadcast(self, value: T) -> T:
        """Returns the value of rank 0 in every process.

        Args:
            value: an object that can be pickled, such as a dict of tensors. Only the value of rank
                0 is used.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Returns a list of the values of all processes, in every process.

        Args:
            value: the value of this process, an object that can be pickled.

        Returns:
            The values of all processes, in the order of the ranks.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Makes every process raise an error if one process fails in the block.

        Every process has to enter the `with` block. At the end of the block, each process waits for
        all others. A process has failed if the block raises Refused or Failed. Other exceptions
        affect only their own process.

        Raises:
            Refused, Failed: this process failed, and no process with a lower rank failed.
            RefusedElsewhere: this process did not fail but another one did, or a process with a
                lower rank failed.
        """
        error = None
        try:
            yield
        except (Refused, Failed) as raised:
            error = raised
        if self.size > 1 and not getattr(error, "is_agreed", False):
            outcomes = enumerate(self.all_gather(error is not None))
            failed = [rank for rank, has_failed in outcomes if has_failed]
            if failed and failed[0] != self.rank:
                error = RefusedElsewhere(f"refused by rank {failed[0]}")
            if failed:
                error.is_agreed = True  # an enclosing agreement then exchanges nothing
        if error is not None:
            raise error

    @contextlib.contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        """Makes one process of each machine run the `with` block before the others.

        The process with local rank 0 runs the block first. The other processes wait until the block
        is done on all machines. If the block raises Refused or Failed in one process, every process
        raises an error.
        """
        leads = self.launch.local_rank == 0
        for turn_of_leaders in (True, False):
            with self.agreement():
                if leads == turn_of_leaders:
                    yield

    # -- training ------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model wrapped in DistributedDataParallel.

        In a single process, the model is returned without a wrapper.
        """
        if self.size == 1:
            return model
        # find_unused_parameters makes DDP add up the gradients in the same order in every step.
        # Without it, DDP assigns them to other buckets after the first step, and a resumed run
        # would differ in rounding. The option permits frozen parameters, too.
        return DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def no_sync(self, model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
        """Returns a context in which `backward` does not average gradients over the processes.

        Args:
            model: the model that `wrap` returned.
            enabled: if False, the context has no effect, and gradients are averaged.
        """
        return model.no_sync() if enabled and self.size > 1 else contextlib.nullcontext()

    def sum(self, value: T, device: torch.device) -> T | torch.Tensor:
        """Returns the sum of a value over all processes.

        Args:
            value: a number, or a tensor that has the same shape in every process.
            device: the device on which this process computes the sum.

        Returns:
            A float64 tensor with the shape of `value`. In a single process, `value` is returned
            unchanged.
        """
        if self.size == 1:
            return value
        total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
        dist.all_reduce(total)
        return total

    def sum_metrics(self, metrics: RunningMetrics) -> RunningMetrics:
        """Adds up the running metrics of all processes.

        Every process has to call this method, and gets the same total.

        Args:
            metrics: the sums over the images of this process. The total replaces these sums.

        Returns:
            The object `metrics`, which contains the total.
        """
        if self.size > 1:
            packed = metrics.pack()
            metrics.unpack(self.sum(packed, packed.device))
        return metrics

    def broadcast_module(self, module: nn.Module | None) -> None:
        """Copies the state dict of the module of rank 0 to all processes.

        The modules of the processes can differ before the copy. For example, each process computes
        the running statistics of BatchNorm from its own images.

        Args:
            module: the module of this process, which is changed in place. If None, nothing is done.
        """
        if self.size == 1 or module is None:
            return
        extra = {}  # from get_extra_state
        for name, value in module.state_dict().items():
            if isinstance(value, torch.Tensor):
                dist.broadcast(value, src=0)
            else:
                extra[name] = value
        if extra:
            load_state(module, self.broadcast(extra), strict=False)

    def synchronized(self, batches: Iterable[T], number: int) -> Iterator[T]:
        """Yields the batches of this process, and stops all processes at the same batch.

        Every process has to call this method. If one process receives a signal or cannot load a
        batch, all processes raise an error. All processes raise the error in place of the same
        batch. With several processes, a signal can take effect one batch late.

        Args:
            batches: the batches of this process.
            number: the largest number of batches in any process.

        Raises:
            Stopped: a process received a signal.
            DataFailed: a process cannot load a batch.
        """
        batches = iter(batches)
        if self.size == 1:
            yield from iter(lambda: self._next(batches), None)
            return
        following = self._begin_agreement(batches) if number else None
        for left in reversed(range(number)):
            batch = following()
            following = self._begin_agreement(batches) if left else None
            if batch is not None:
                yield batch
            del batch  # frees its memory before the next one is loaded

    def _next(self, batches: Iterator[T]) -> T | None:
        """Returns the next batch, or None after the last one.

        Raises:
            Stopped: a signal came before or during the wait for the batch.
            DataFailed: the batch cannot be loaded.
        """
        return self.stop.interruptible(lambda: next(batches, None))

    def _begin_agreement(self, batches: Iterator[T]) -> Callable[[], T | None]:
        """Loads the next batch, and begins to tell the other processes the outcome.

        Returns:
            A function that waits until all processes have sent their outcome. The function returns
            the batch, or None if this process has no more batches. The function raises DataFailed
            if a process could not load its batch, and Stopped if a process received a signal.
        """
        batch = failure = None
        try:
            batch = self._next(batches)
        except DataFailed as error:
            failure = error
        except Stopped:
            pass  # the all-reduce tells the others, and all stop before this batch
        # The signal that this process received, or 0; and 0 without a failure, else the rank plus
        # 1. The all-reduce replaces each number by the maximum over all processes.
        state = torch.tensor([self._signal(), self.rank + 1 if failure else 0])
        work = dist.all_reduce(state, dist.ReduceOp.MAX, async_op=True)

        def end() -> T | None:
            work.wait()
            signalled, failed = state.tolist()
            if failed:
                raise failure or DataFailed(f"rank {failed - 1} cannot load its images")
            if signalled:
                raise Stopped(signalled)
            return batch

        return end

    def _signal(self) -> int:
        """Returns the number of the signal that this process received, or 0.

        If torchrun started this process and has ended, the result is SIGTERM.
        """
        is_orphan = os.getppid() != self._launcher
        return self.stop.received or (signal.SIGTERM if is_orphan else 0)


ALONE = Group()


@contextlib.contextmanager
def process_group(stop: StopSignals) -> Iterator[Group]:
    """Connects the processes that torchrun started, and disconnects them after the block.

    Args:
        stop: the signal handlers of this process.

    Yields:
        The group of the processes. Without torchrun, the group contains only this process.

    Raises:
        Refused: the other processes cannot be reached or do not connect in time.
        Failed: another process has ended too early.
    """
    group = Group(find_launch(), stop)
    group.connect()
    try:
        yield group
        group.disconnect()
    except (dist.DistError, RuntimeError) as error:
        of_connection = "gloo" in str(error) or "Connection" in str(error)
        if group.size > 1 and (isinstance(error, dist.DistError) or of_connection):
            where = "its own output, or the lines above, say why"
            raise Failed(f"another process of this run has ended; {where}") from None
        raise


def _attempt() -> str:
    """Returns a prefix for the keys in torchrun's store, such as "attempt 1".

    The store contains the addresses of the processes. The number in the prefix counts the restarts
    by torchrun. A restarted process thus ignores the addresses from before the restart. If every
    restart begins with a new store, the prefix is always "attempt 0".
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT') if shared else 0}"
