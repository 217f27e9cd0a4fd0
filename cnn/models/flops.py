"""Floating-point operations of a model, counted as it computes.

torch.utils.flop_counter does the same; importing it takes a tenth of a second and 72 MB, since it
brings in Triton, and using it brings in torch._dynamo: half as long as torch itself.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


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
        count = COUNTS.get(getattr(function, "overloadpacket", None))
        if count is not None:
            self.total += count(args, out)
        return out


def _of_convolution(args: tuple, out: torch.Tensor) -> int:
    images, weight, transposed = args[0], args[1], args[6]
    places = (images if transposed else out).shape[2:]  # where the kernel is laid
    return 2 * len(images) * math.prod(places) * weight.numel()


def _of_product(args: tuple, out: torch.Tensor) -> int:
    return 2 * out.numel() * args[-2].shape[-1]  # (..., N, K) times (..., K, M)


def _of_attention(args: tuple, out: Any) -> int:
    query, key, value = args[:3]  # N, heads, length, size
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])


PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
ATTENTION = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
COUNTS = dict.fromkeys(PRODUCTS, _of_product) | dict.fromkeys(ATTENTION, _of_attention)
COUNTS[aten.convolution] = _of_convolution
