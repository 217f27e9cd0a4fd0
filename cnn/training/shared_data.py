"""Data once a machine, not once a process: the first process there reads, the others map its memory."""

import math
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from cnn.datasets.build import Data
from cnn.datasets.cache import allocate, remove_leftovers
from cnn.datasets.images import UserImages

if TYPE_CHECKING:
    from cnn.training.distributed import Group

LARGE = 2**20  # bytes of a tensor from which on it is worth a file of its own
PREFIX = "cnn_shared_"
MEMORY = Path("/dev/shm")  # a file system in memory, on Linux


def build_once_per_node(group: "Group", build: Callable[[], Data]) -> Data:
    """What `build` gives in one process of this machine, in all of them, pixels in memory once.

    A dataset of the user's own, which may hold an open file, each builds anew, after the first has:
    what that downloads is there then.

    Raises:
        Refused: the data cannot be had, on this machine or on another.
    """
    if group.size == 1:
        return build()
    leads = group.launch.local_rank == 0
    folder = None
    with group.agreement():
        data = build() if leads else None
    try:
        if leads:
            folder = _write(data)
        folders = dict(group.all_gather((group.launch.node, folder) if leads else (None, None)))
        given = folders[group.launch.node]
        with group.agreement():
            if given is not None:
                data = _read(given)  # the first process too: what it has built is freed
            elif not leads:
                data = build()
        return data
    finally:
        if folder is not None:  # what is mapped stays; a file without a name is gone with its users
            shutil.rmtree(folder, ignore_errors=True)


def _write(data: Data) -> Path | None:
    """Puts the data into a folder of its own; None where they cannot be handed on."""
    if isinstance(data.train, UserImages):
        return None
    for place in (MEMORY, Path(tempfile.gettempdir())):
        folder = None
        try:
            remove_leftovers(place.glob(f"{PREFIX}*"))
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))  # nobody else may read it
            with open(folder / "data", "wb") as file:
                _Pickler(file, folder).dump(data)
            return folder
        except OSError:  # no room there, or no such place
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    return None


def _read(folder: Path) -> Data:
    with open(folder / "data", "rb") as file:
        return pickle.load(file)  # written a moment ago by this run


class _Pickler(pickle.Pickler):
    """Writes large tensors and arrays to files that are mapped into memory where they are read."""

    def __init__(self, file: IO[bytes], folder: Path):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._folder, self._number = folder, 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.nbytes < LARGE or not value.is_contiguous():
            return NotImplemented
        self._number += 1
        path = self._folder / str(self._number)
        with open(path, "wb") as out:
            allocate(out, value.nbytes)
        _map(path, value.dtype, tuple(value.shape)).copy_(value)
        return _map, (path, value.dtype, tuple(value.shape))


def _map(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    whole = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
    return whole.view(shape)
