"""The processes that torchrun has started for a run. This module does not import torch."""

import os
from dataclasses import dataclass

from cnn.errors import Refused


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of its run.

    The default values describe a run of one process.

    Attributes:
        rank: the index of this process among all processes of the run. Rank 0 logs and writes
            files.
        size: the number of all processes of the run.
        local_rank: the index of this process among those on the same machine.
        local_size: the number of processes on the same machine.
        node: the index of this machine among those of the run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0

    @property
    def is_rank0(self) -> bool:
        """A flag that is True on rank 0, the process that logs and writes files."""
        return self.rank == 0


def find_launch() -> Launch:
    """Reads the place of this process in its run from the environment variables of torchrun.

    Without these variables, this process is taken to be the only one of its run.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    try:
        return Launch(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError):
        return Launch()


def command(*words: str) -> list[str]:
    """Returns a command that runs a script in as many processes as this run has.

    Args:
        words: the script and its arguments, such as "train.py" and "--resume".

    Returns:
        The words of the command, such as ["python", "train.py", "--resume"]. The first word is
        "python" if this run has a single process, and otherwise "torchrun". If the run uses several
        machines, the word "..." stands for the options of torchrun that the user has to add.
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
            The error message begins with this text.
    """
    launch = find_launch()
    if launch.size > 1:
        fault = f"is the work of one process, and torchrun has started {launch.size}"
        raise Refused(f"{what} {fault}; leave torchrun out")
