"""Checkpoint files for the tests: a real tiny one, broken ones, hostile ones."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FIRST_FORMAT = Path(__file__).parent / "data" / "format_1.pth"
FIRST_DRAWS = FIRST_FORMAT.with_name("draws_1.pth")

# What would tell that a file was executed.
MARKER = Path("executed")


def content() -> dict[str, Any]:
    """The content of a real checkpoint, to be changed at will."""
    return torch.load(FIRST_FORMAT, weights_only=True)


def saved(tree: Any, **options: Any) -> bytes:
    """The bytes that torch.save makes of it."""
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A checkpoint with its content changed."""
    tree = content()
    change(tree)
    return saved(tree)


def rezipped(
    compression: int = zipfile.ZIP_STORED,
    replace: dict[str, bytes] | None = None,
    twice: str | None = None,
) -> bytes:
    """A checkpoint's members packed anew, some of them replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(FIRST_FORMAT) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            data = (replace or {}).get(name.rsplit("/", 1)[-1], old.read(name))
            new.writestr(name, data)
            if twice and name.endswith(twice):
                new.writestr(name.upper(), data)
    return buffer.getvalue()


class Reduced:
    """Unpickles as a call: what a hostile file would have run."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def with_pickle(pickled: bytes) -> bytes:
    """A checkpoint whose data.pkl is another."""
    return rezipped(replace={"data.pkl": pickled})


def hostile(function: Any, *arguments: Any) -> bytes:
    """A checkpoint that calls something when it is unpickled without care."""
    with_tensors = ("model_state_dict", "optimizer_state_dict", "unfinished_epoch", "predictions")
    tree = content() | {key: {} for key in with_tensors}
    tree["environment"] = Reduced(function, *arguments)
    return with_pickle(pickle.dumps(tree, protocol=2))
