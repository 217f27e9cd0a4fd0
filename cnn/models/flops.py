"""Floating-point operations of a model, counted as it computes, by torch's own formulas.

Its FlopCounterMode does the same and a table of modules; it brings in torch._dynamo, which takes
half as long as torch itself.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def count_flops(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Counts the operations of one image's way forward, a multiply-add as two; of products alone.

    A copy of the model computes, so that nothing in the model moves. (Not on the meta device: for
    that torch loads its decompositions first, as long as it takes to load torch.)

    Args:
        shape: of an image, (C, H, W).

    Returns:
        None for a model that cannot be copied.
    """
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), _Counter() as counter:
            copy.deepcopy(model).eval()(torch.zeros(1, *shape, device=device))
    except Exception:  # noqa: BLE001  the user's own code, and no figure is worth a training
        return None
    return counter.total


class _Counter(TorchDispatchMode):
    """Sees every operation that a model comes down to, and adds up those that multiply."""

    def __init__(self):
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is counted is not compiled; the wrapper would import torch._dynamo

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(function, "overloadpacket", None))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
