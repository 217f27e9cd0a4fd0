"""One run in several processes, started by torchrun: what they do together, and what they agree on.

Every process holds the whole model (DistributedDataParallel; Li et al., VLDB 2020) and computes its
share of every batch. With one process, all of this does nothing.
"""

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cnn.errors import DataFailed, Failed, ProcessLost, Refused, RefusedElsewhere, Stopped
from cnn.metrics.running import EvaluationMetrics, RunningMetrics
from cnn.utils.launch import Launch, find_launch
from cnn.utils.module_state import load_state
from cnn.utils.signals import StopSignals

T = TypeVar("T")

# How long a process waits for the others before it gives up: within a step, and while the first one
# of a machine decodes a large set of images.
STEP_TIMEOUT = datetime.timedelta(minutes=10)
BUILD_TIMEOUT = datetime.timedelta(days=1)


class Group:
    """The processes of a run, as one of them sees it."""

    def __init__(self, launch: Launch | None = None, stop: StopSignals | None = None):
        self.launch, self.stop = launch or Launch(), stop
        self.rank, self.size = self.launch.rank, self.launch.size
        self.is_rank0 = self.launch.is_rank0
        # What is random inside a step is each process's own, for the first the same as alone.
        self.key = (self.rank,) if self.rank else ()
        self._launcher = os.getppid()
        self._patient: dist.ProcessGroup | None = None  # for what may take long

    def connect(self) -> None:
        """Waits for the others.

        Raises:
            Refused: they do not come, or cannot be reached.
        """
        if self.size == 1:
            return
        self.stop.is_single_process = False
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            with self.stop.default_handlers():  # inside of torch no handler of ours would be called
                store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
                store = dist.PrefixStore(_attempt(), store)
                dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT
                )
                self._patient = dist.new_group(backend="gloo", timeout=BUILD_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise Refused(
                f"torchrun: the {self.size} processes did not meet at {where}:"
                f" {str(error).splitlines()[0]}"
            ) from None

    def disconnect(self) -> None:
        """Waits until all are done, and takes the connections down."""
        if self.size > 1:
            dist.barrier(self._patient)
            dist.destroy_process_group()

    # -- before training -----------------------------------------------------------------------

    def first(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, in all of them; plain values and tensors.

        Raises:
            Refused, Failed: there, and with it everywhere.
        """
        if self.size == 1:
            return act()
        given, refusal = None, None
        if self.is_rank0:
            try:
                given = act()
            except (Refused, Failed) as refused:
                refusal = refused
        told = [(given, refusal is not None)]
        dist.broadcast_object_list(told, src=0, group=self._patient)
        if told[0][1]:
            raise refusal or RefusedElsewhere("refused by the first process")
        return told[0][0]

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives, in every process its own.

        Raises:
            Refused: in one, and with it everywhere; one of them tells why.
        """
        if self.size == 1:
            return act()
        given, refusal = None, None
        try:
            given = act()
        except Refused as refused:
            refusal = refused
        kinds = self.all_gather(type(refusal).__name__)
        if any(kind != "NoneType" for kind in kinds):
            told = [
                rank
                for rank, kind in enumerate(kinds)
                if kind not in ("NoneType", "RefusedElsewhere")
            ]
            raise (
                refusal if self.rank in told[:1] else RefusedElsewhere("refused by another process")
            )
        return given

    def local_rank0_first(self, act: Callable[[], T]) -> T:
        """What `act` gives in every process; one of each machine has done it before the others."""
        if self.launch.local_rank == 0:
            given = self.together(act)
            return self.together(lambda: given)
        self.together(lambda: None)
        return self.together(act)

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    # -- training ------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass leaves the mean of all processes' gradients in each.

        Looking for unused parameters in every step keeps the order in which gradients are added
        the same from the first step on, and with it the bits after a resume; otherwise they are
        put into other buckets after the first step. Frozen parameters are unused ones too.
        """
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def accumulating(self, forward: nn.Module, more: bool) -> contextlib.AbstractContextManager:
        """Around a forward pass: whether its gradients wait for those of more batches."""
        return forward.no_sync() if more and self.size > 1 else contextlib.nullcontext()

    def sum(self, value: T, device: torch.device) -> Callable[[], T | torch.Tensor]:
        """Begins to sum a number or a tensor over all processes, exact to float64.

        Returns:
            What waits for the sum, and gives it.
        """
        if self.size == 1:
            return lambda: value
        total = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
        work = dist.all_reduce(total, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return total

        return wait

    def add_up(self, sums: RunningMetrics) -> Callable[[], None]:
        """Begins to make of every process's sums those of all; what it returns waits for them."""
        if self.size == 1:
            return lambda: None
        own = sums.pack()
        total = self.sum(own, own.device)
        return lambda: sums.unpack(total())

    def gather(self, outcome: EvaluationMetrics) -> None:
        """Makes of every process's part of an evaluation the whole."""
        if self.size > 1:
            outcome.gather(self.all_of)

    def broadcast_module(self, module: nn.Module | None) -> None:
        """Gives every process the first one's weights and buffers of a module.

        What BatchNorm has seen differs: it sees the process's own images.
        """
        if self.size > 1 and module is not None:
            extra = {}  # of get_extra_state
            for name, value in module.state_dict().items():
                if isinstance(value, torch.Tensor):
                    dist.broadcast(value, src=0)
                else:
                    extra[name] = value
            if extra:
                load_state(module, self.first(lambda: extra), strict=False)

    def in_step(self, batches: Iterable[T], number: int) -> Iterator[T]:
        """Passes batches on, each once every process has its own, and `number` times.

        A process that has fewer waits with the others. Where one cannot go on, all stop before the
        same batch. The next batch is made, and agreed on, before this one is computed: the agreement
        takes no time of its own, and a signal that comes meanwhile stops all one batch later.

        Raises:
            Stopped: one of them was sent a signal.
            DataFailed: one of them cannot have its batch.
        """
        own = iter(batches)
        if self.size == 1:
            yield from iter(lambda: self._next(own), None)
            return
        following = self._agree_on(own) if number else None
        for left in reversed(range(number)):
            batch, agreement = following
            agreement.wait()
            following = self._agree_on(own) if left else None
            if batch is not None:
                yield batch
            del batch  # before another one is made

    def _next(self, batches: Iterator[T]) -> T | None:
        """The next batch, None after the last; a signal ends the wait for it."""
        return (
            self.stop.interruptible(lambda: next(batches, None))
            if self.stop
            else next(batches, None)
        )

    def _agree_on(self, batches: Iterator[T]) -> "tuple[T | None, _Agreement]":
        """The next batch, if it can be had, and the agreement on it, under way."""
        batch = failure = None
        try:
            batch = self._next(batches)
        except DataFailed as error:
            failure = error
        except Stopped:
            pass  # the others are told, and all stop before this batch
        said = torch.tensor([self._signal(), self.rank + 1 if failure else 0])
        work = dist.all_reduce(said, dist.ReduceOp.MAX, async_op=True)
        return batch, _Agreement(said, work, failure)

    def _signal(self) -> int:
        """The signal that this process was sent, or 0; a launcher that is gone counts as one."""
        if self.stop.received is None and os.getppid() != self._launcher:
            return signal.SIGTERM
        return self.stop.received or 0

    def wait(self) -> None:
        """Waits until all are here: nobody leaves while the first one saves."""
        if self.size > 1:
            dist.barrier(self._patient)


@dataclass
class _Agreement:
    """Whether all go on with a batch, on its way.

    Attributes:
        said: of all processes the largest signal that one was sent, and rank, from 1, of one that
            cannot have its batch; 0 where there is none.
        failure: why this one cannot.
    """

    said: torch.Tensor
    work: "dist.Work"
    failure: DataFailed | None

    def wait(self) -> None:
        """Raises Stopped or DataFailed where one of them cannot go on."""
        self.work.wait()
        signalled, failed = self.said.tolist()
        if failed:
            raise self.failure or DataFailed(f"rank {failed - 1} cannot have its images")
        if signalled:
            raise Stopped(signalled)


def _attempt() -> str:
    """What torchrun's restarts are told apart by, where they share a store of addresses.

    Without, a process started again would look for the others where they were before.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT') if shared else 0}"


ALONE = Group()


@contextlib.contextmanager
def process_group(stop: StopSignals) -> Iterator[Group]:
    """The group that torchrun has started this process in; alone without it.

    Raises:
        ProcessLost: another process has gone while this one needed it.
    """
    group = Group(find_launch(), stop)
    group.connect()
    try:
        yield group
        group.disconnect()
    except (dist.DistError, RuntimeError) as error:
        of_connection = "gloo" in str(error) or "Connection" in str(error)
        if group.size > 1 and (isinstance(error, dist.DistError) or of_connection):
            raise ProcessLost(
                "another process of this run is gone; what ended it is told by that one, above or"
                " in its own output"
            ) from None
        raise
