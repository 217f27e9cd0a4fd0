"""Which of a run's processes this is, as torchrun says; nothing here imports torch."""

import os
from dataclasses import dataclass

from cnn.errors import Refused


@dataclass(frozen=True)
class Launch:
    """This process among those of its run.

    Attributes:
        rank: its number among all of them; the first, 0, talks and writes.
        size: how many there are.
        local_rank, local_size: the same among those on this machine.
        node: the number of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


ALONE = Launch()


def find_launch() -> Launch:
    """What torchrun has put into the environment; one process where it has not."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError):
        return ALONE


def command(*words: str) -> list[str]:
    """The words that run a script of ours in as many processes as this one's run has."""
    launch = find_launch()
    if launch.size == 1:
        return ["python", *words]
    nodes = -(-launch.size // launch.local_size)
    several = [f"--nnodes={nodes}", "..."] if nodes > 1 else []
    return ["torchrun", *several, f"--nproc-per-node={launch.local_size}", *words]


def refuse_several(what: str) -> None:
    """Raises Refused under torchrun, for what is one process's work."""
    launch = find_launch()
    if launch.size > 1:
        raise Refused(
            f"{what} is the work of one process, and torchrun has started {launch.size};"
            f" leave torchrun out"
        )
