"""One run in several processes, started by torchrun: what they exchange, and where they agree.

Every process holds the whole model (DistributedDataParallel; Li et al., VLDB 2020) and computes its
share of every batch. With one process, all of this does nothing.
"""

import contextlib
import datetime
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cnn.errors import DataFailed, Failed, ProcessLost, Refused, RefusedElsewhere, Stopped
from cnn.metrics.running import RunningMetrics
from cnn.utils.launch import Launch, find_launch
from cnn.utils.module_state import load_state
from cnn.utils.signals import StopSignals

T = TypeVar("T")

# A batch or the error in its place, and the tensor and the handle of an all-reduce under way.
Pending = tuple[Any, DataFailed | None, torch.Tensor, "dist.Work"]

# How long a process waits for the others before it gives up: within a step, and while the first
# process of a machine decodes a large set of images.
STEP_TIMEOUT = datetime.timedelta(minutes=10)
BUILD_TIMEOUT = datetime.timedelta(days=1)


class Group:
    """The processes that train together.

    Attributes:
        rank, size: number of this process, and how many there are.
        is_rank0: whether this is the process that logs and writes files.
        key: added to the key of random numbers inside a step, which differ between processes; that
            of rank 0 is empty, so that it draws what a single process draws.
    """

    def __init__(self, launch: Launch | None = None, stop: StopSignals | None = None):
        self.launch, self.stop = launch or Launch(), stop or StopSignals()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.is_rank0 = self.launch.is_rank0
        self.key = (self.rank,) if self.rank else ()
        self._launcher = os.getppid()
        self._patient: dist.ProcessGroup | None = None  # for exchanges that may take long

    def connect(self) -> None:
        """Waits for the other processes and connects to them.

        Raises:
            Refused: they do not come, or cannot be reached.
        """
        if self.size == 1:
            return
        self.stop.is_single_process = False
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            with self.stop.default_handlers():  # torch would call no handlers while it waits
                store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
                store = dist.PrefixStore(_attempt(), store)
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT
                )
                self._patient = dist.new_group(backend="gloo", timeout=BUILD_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            what = f"the {self.size} processes did not meet at {address}"
            raise Refused(f"torchrun: {what}: {str(error).splitlines()[0]}") from None

    def disconnect(self) -> None:
        """Waits until all processes are done, and closes the connections."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()

    # -- before and after training -------------------------------------------------------------

    def barrier(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier(self._patient)

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value in every process; plain values and tensors."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._patient)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all processes, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Ends the block with an error in every process where one of them raises Refused or Failed.

        The first process that failed raises its own error, the others RefusedElsewhere.
        """
        error = None
        try:
            yield
        except (Refused, Failed) as raised:
            error = raised
        if self.size > 1 and not getattr(error, "is_agreed", False):
            failed = [
                rank for rank, is_so in enumerate(self.all_gather(error is not None)) if is_so
            ]
            if failed and failed[0] != self.rank:
                error = RefusedElsewhere(f"refused by rank {failed[0]}")
            if failed:
                error.is_agreed = True  # an agreement around this one is not to ask again
        if error is not None:
            raise error

    @contextlib.contextmanager
    def local_rank0_first(self) -> Iterator[None]:
        """Runs the block in one process of each machine, then in the others; all agree."""
        leads = self.launch.local_rank == 0
        if not leads:
            with self.agreement():
                pass
        with self.agreement():
            yield
        if leads:
            with self.agreement():
                pass

    # -- training ------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model in a wrapper whose backward pass averages gradients over the processes.

        Searching for unused parameters in every step keeps the order in which gradients are added
        the same from the first step on, and with it the bits after a resume; otherwise they move to
        other buckets after the first step. Frozen parameters are unused ones too.
        """
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def no_sync(self, model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
        """Returns a context in which the wrapped model's gradients accumulate, not averaged."""
        return model.no_sync() if enabled and self.size > 1 else contextlib.nullcontext()

    def sum(self, value: T, device: torch.device) -> T | torch.Tensor:
        """Returns the sum over all processes of a number or a tensor, in float64."""
        if self.size == 1:
            return value
        total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
        dist.all_reduce(total)
        return total

    def sum_metrics(self, metrics: RunningMetrics) -> RunningMetrics:
        """Sums running metrics over all processes, in place."""
        if self.size > 1:
            packed = metrics.pack()
            metrics.unpack(self.sum(packed, packed.device))
        return metrics

    def broadcast_module(self, module: nn.Module | None) -> None:
        """Copies rank 0's weights, buffers and extra state of a module to all processes.

        They differ where BatchNorm has seen the images of its own process alone.
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
        """Yields batches, each once every process has its own; where one fails, all stop before it.

        The next batch is loaded and agreed on before this one is computed, so that the agreement
        takes no time; a signal that comes meanwhile stops all processes one batch later.

        Args:
            number: of batches in the process that has most; those with fewer wait for it.

        Raises:
            Stopped: one of the processes received a signal.
            DataFailed: one of them cannot load its batch.
        """
        batches = iter(batches)
        if self.size == 1:
            yield from iter(lambda: self._next(batches), None)
            return
        following = self._begin_agreement(batches) if number else None
        for left in reversed(range(number)):
            batch = self._end_agreement(*following)
            following = self._begin_agreement(batches) if left else None
            if batch is not None:
                yield batch
            del batch  # frees its memory before another one is made

    def _next(self, batches: Iterator[T]) -> T | None:
        """Returns the next batch, or None after the last; a signal interrupts the wait for it."""
        return self.stop.interruptible(lambda: next(batches, None))

    def _begin_agreement(self, batches: Iterator[T]) -> Pending:
        """Loads the next batch; starts an all-reduce of (signal received, rank + 1 if failed)."""
        batch = failure = None
        try:
            batch = self._next(batches)
        except DataFailed as error:
            failure = error
        except Stopped:
            pass  # the all-reduce tells the others, and all stop before this batch
        state = torch.tensor([self._signal(), self.rank + 1 if failure else 0])
        work = dist.all_reduce(state, dist.ReduceOp.MAX, async_op=True)
        return batch, failure, state, work

    def _end_agreement(self, batch: T | None, failure: Any, state: Any, work: Any) -> T | None:
        """Waits for the all-reduce; returns the batch, or raises where one process cannot go on."""
        work.wait()
        signalled, failed = state.tolist()
        if failed:
            raise failure or DataFailed(f"rank {failed - 1} cannot load its images")
        if signalled:
            raise Stopped(signalled)
        return batch

    def _signal(self) -> int:
        """Returns the signal that this process received, or 0; torchrun's end counts as one."""
        if self.stop.received is None and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self.stop.received or 0


ALONE = Group()


@contextlib.contextmanager
def process_group(stop: StopSignals) -> Iterator[Group]:
    """Connects the processes that torchrun has started; a group of one without torchrun.

    Raises:
        ProcessLost: another process ended while this one needed it.
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
            raise ProcessLost(f"another process of this run has ended; {where}") from None
        raise


def _attempt() -> str:
    """Returns a prefix that separates the restarts of torchrun in their shared store of addresses.

    Without it, a restarted process would look for the others at their old addresses.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT') if shared else 0}"
