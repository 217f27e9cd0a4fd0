"""The differences between two checkpoints, bit by bit."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from cnn.drill.trace import digest

# Keys that say when and where a run ran; nothing else may differ between equal runs.
IGNORED = ("environment", "started", "seconds", "images_per_second")

# A value of a type of its own, in the place of a value that only one of two trees has.
MISSING = type("missing", (), {})()


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Yields a text for each difference between two trees of values.

    An example of a text is "history[0].lr: 0.1, 0.2". A tree consists of nested dicts, lists and
    tuples of tensors and plain values. The content of a checkpoint is a tree. Tensors are compared
    bit by bit. Values that say when or where a run ran, such as the key "seconds", are not
    compared.

    Args:
        first: a tree.
        second: the tree to compare with `first`.
        path: the place of both trees within larger trees, such as "history[0]"; "" for whole trees.
    """
    if path.rsplit(".", 1)[-1] in IGNORED:
        return
    if type(first) is not type(second):
        yield f"{path}: {type(first).__name__}, {type(second).__name__}"
    elif isinstance(first, dict):
        for key in first | second:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(first.get(key, MISSING), second.get(key, MISSING), inner)
    elif isinstance(first, (list, tuple)):
        for number, pair in enumerate(itertools.zip_longest(first, second, fillvalue=MISSING)):
            yield from differences(*pair, f"{path}[{number}]")
    elif isinstance(first, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            kinds = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (first, second)]
            yield f"{path}: {kinds[0]}, {kinds[1]}"
        elif digest(first) != digest(second):
            distance = (first.double() - second.double()).abs().max().item()
            yield f"{path}: differ by up to {distance:g}"
    elif repr(first) != repr(second):  # equal for floats of the same bits, even for nan
        yield f"{path}: {first!r}, {second!r}"
