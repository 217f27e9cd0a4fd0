"""Depthwise convolutions that train faster on CPUs with AMX.

In bf16, oneDNN computes the gradients of a depthwise convolution 1.4 to 9 times as slowly as in
fp32, and the outputs up to 3 times as fast (8 shapes, one thread). Here the outputs are computed in
bf16 and the gradients in fp32.
"""

import torch
from torch import nn
from torch.nn import functional as F

BF16 = torch.bfloat16


def use_depthwise(model: nn.Module) -> None:
    """Makes the depthwise convolutions of a model train faster.

    The convolutions are faster only on a CPU with AMX, in bf16 autocast. A depthwise convolution
    gets the class `DepthwiseConv2d`. The parameters, hooks and names stay the same.

    Args:
        model: the model, whose convolutions are changed in place.
    """
    for module in model.modules():
        is_plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        if is_plain and 1 < module.groups == module.in_channels == module.out_channels:
            module.__class__ = DepthwiseConv2d


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that trains faster in bf16.

    The outputs are those of nn.Conv2d. The gradients are rounded once, and not in between.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        is_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == BF16
        if not is_bf16 or not torch.is_grad_enabled() or isinstance(self.padding, str):
            return super().forward(images)
        bias = None if self.bias is None else self.bias.to(BF16)
        geometry = (self.stride, self.padding, self.dilation)
        return _Convolution.apply(images.to(BF16), self.weight.to(BF16), bias, geometry)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, geometry):
        ctx.save_for_backward(images, weight)
        ctx.geometry, ctx.bias_shape = geometry, None if bias is None else [len(weight)]
        return F.conv2d(images, weight, bias, *geometry, len(weight))

    @staticmethod
    def backward(ctx, gradient):
        tensors = (tensor.float() for tensor in (gradient, *ctx.saved_tensors))
        mask, groups = ctx.needs_input_grad[:3], len(gradient[0])
        geometry = (*ctx.geometry, False, [0, 0], groups, mask)
        found = torch.ops.aten.convolution_backward(*tensors, ctx.bias_shape, *geometry)
        return *(each if each is None else each.to(BF16) for each in found), None
