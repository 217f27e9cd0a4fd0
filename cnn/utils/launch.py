"""The processes that torchrun has started for a run. This module does not import torch."""

import os
from dataclasses import dataclass

from cnn.errors import Refused


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of a run.

    The default values describe a run of one process.

    Attributes:
        rank: the index of this process among all processes of the run. The process of rank 0 logs
            and writes files.
        size: the number of all processes of the run.
        local_rank: the index of this process among the processes on this machine.
        local_size: the number of processes on this machine.
        node: the index of this machine among the machines of the run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def is_rank0(self) -> bool:
        """A flag that is True in the process of rank 0, which writes files."""
        return self.rank == 0


def find_launch() -> Launch:
    """Reads the place of this process from the environment variables of torchrun.

    Without the variables, the result describes a run of one process.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError):
        return Launch()


def command(*words: str) -> list[str]:
    """Returns a command that runs a script in as many processes as this run.

    Args:
        words: the script and the arguments of the script, such as "train.py" and "--resume".

    Returns:
        The words of the command, such as ["python", "train.py", "--resume"]. For several processes,
        the first word is "torchrun". For several machines, the word "..." stands for options of
        torchrun that the user has to add.
    """
    launch = find_launch()
    if launch.size == 1:
        return ["python", *words]
    num_nodes = -(-launch.size // launch.local_size)
    nodes = [f"--nnodes={num_nodes}", "..."] if num_nodes > 1 else []
    return ["torchrun", *nodes, f"--nproc-per-node={launch.local_size}", *words]


def refuse_multiple_processes(what: str) -> None:
    """Raises Refused if torchrun has started several processes.

    Args:
        what: the option or script that needs a single process, such as "--find-lr" or "compare.py".
            The error message begins with `what`.
    """
    launch = find_launch()
    if launch.size > 1:
        fault = f"is the work of one process, and torchrun has started {launch.size}"
        raise Refused(f"{what} {fault}; leave torchrun out")
