"""A count of the floating-point operations of a model, and the shapes of its layers' outputs.

torch.utils.flop_counter does the same, but importing and using it loads Triton and torch._dynamo,
which takes 1.2 seconds of a run's start.
"""

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def count_flops(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Returns the number of floating-point operations in the forward pass of one image.

    Only convolutions, matrix products and attention are counted. A multiplication with the
    following addition counts as two operations. The model stays unchanged.

    Args:
        model: the model, on any device.
        shape: the shape of the image, (channels, height, width).

    Returns:
        The number of operations, or None if the model cannot be copied or fails.
    """
    return trace_model(model, shape)[0]


def trace_model(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[int | None, list[tuple[str, tuple[int, ...]]]]:
    """Returns what `count_flops` does, and the shape of each layer's output for one image.

    Args:
        model: the model, on any device, which stays unchanged.
        shape: the shape of the image, (channels, height, width).

    Returns:
        The number of operations, or None if it is unknown. A list of the name of each layer without
        sublayers and the shape of its output, in the order of the computation.
    """
    device, outputs = next(model.parameters()).device, []

    def keep(name: str, _layer: nn.Module, _images: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((name, tuple(output.shape)))

    try:
        # The meta device would need no copy, but torch first loads decompositions for it, which
        # takes as long as loading torch.
        copied = copy.deepcopy(model).eval()
        for name, layer in copied.named_modules():
            if not list(layer.children()):
                layer.register_forward_hook(partial(keep, name))
        with torch.no_grad(), _Counter() as counter:
            copied(torch.zeros(1, *shape, device=device))
    except Exception:  # noqa: BLE001  the user's code, and no figure is worth a failed training
        return None, outputs
    return counter.total, outputs


class _Counter(TorchDispatchMode):
    """A context manager that counts the floating-point operations of torch.

    Only convolutions, matrix products and attention are counted.

    Attributes:
        total: the number of operations so far.
    """

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch._dynamo for a wrapper, though nothing is compiled

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        count = COUNTS.get(getattr(function, "overloadpacket", None))
        self.total += count(args, out) if count else 0
        return out


def _count_convolution(args: tuple, out: torch.Tensor) -> int:
    images, weight, transposed = args[0], args[1], args[6]
    positions = (images if transposed else out).shape[2:]  # where the kernel is applied
    return 2 * len(images) * math.prod(positions) * weight.numel()


def _count_product(args: tuple, out: torch.Tensor) -> int:
    return 2 * out.numel() * args[-2].shape[-1]  # (..., N, K) times (..., K, M)


def _count_attention(args: tuple, _out: Any) -> int:
    query, key, value = args[:3]  # N, heads, length, size
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])


PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
COUNTS = {aten.convolution: _count_convolution} | dict.fromkeys(PRODUCTS, _count_product)
COUNTS |= {getattr(aten, f"_scaled_dot_product_{kind}"): _count_attention for kind in ATTENTION}
