"""The processes that torchrun has started for a run; nothing here imports torch."""

import os
from dataclasses import dataclass

from cnn.errors import Refused


@dataclass(frozen=True)
class Launch:
    """This process's place among those of its run; the default is a run of one process.

    Attributes:
        rank: from 0; rank 0 logs and writes.
        size: the number of processes.
        local_rank, local_size: the same among those on this machine.
        node: the number of this machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def find_launch() -> Launch:
    """Returns what torchrun has put into the environment; without torchrun, one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError):
        return Launch()


def command(*words: str) -> list[str]:
    """Returns the command that runs a script in as many processes as this run has."""
    launch = find_launch()
    if launch.size == 1:
        return ["python", *words]
    num_nodes = -(-launch.size // launch.local_size)
    nodes = [f"--nnodes={num_nodes}", "..."] if num_nodes > 1 else []
    return ["torchrun", *nodes, f"--nproc-per-node={launch.local_size}", *words]


def refuse_multiple_processes(what: str) -> None:
    """Raises Refused where torchrun has started several processes, for work of a single one."""
    launch = find_launch()
    if launch.size > 1:
        fault = f"is the work of one process, and torchrun has started {launch.size}"
        raise Refused(f"{what} {fault}; leave torchrun out")
