"""Whether two checkpoints hold the same bits, and if not, where they part."""

from collections.abc import Iterator
from typing import Any

import torch

# What may differ between two runs of one configuration: when and where they ran.
FREE = ("environment", "started", "seconds", "images_per_second")


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """The leaves in which two trees of tensors and plain values differ, as `path: a, b`."""
    if path.rsplit(".", 1)[-1] in FREE:
        return
    if type(first) is not type(second):
        yield f"{path}: {type(first).__name__}, {type(second).__name__}"
    elif isinstance(first, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in first or key not in second:
                yield f"{inner}: only in one of the two"
            else:
                yield from differences(first[key], second[key], inner)
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            yield f"{path}: {len(first)} and {len(second)} items"
        for number, (one, other) in enumerate(zip(first, second)):
            yield from differences(one, other, f"{path}[{number}]")
    elif isinstance(first, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            yield f"{path}: {first.dtype} {tuple(first.shape)}, {second.dtype} {tuple(second.shape)}"
        elif not _same_bits(first, second):
            distance = (first.double() - second.double()).abs().max().item()
            yield f"{path}: differ by up to {distance:g}"
    elif repr(first) != repr(second):  # the same bits of a float; nan is nan
        yield f"{path}: {first!r}, {second!r}"


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    one, other = first.contiguous().flatten(), second.contiguous().flatten()
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
