"""Depthwise convolutions in bf16: the same outputs, gradients of fp32."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cnn.models.depthwise import DepthwiseConv2d, use_depthwise

SHAPES = {
    "3 x 3": {"kernel_size": 3, "padding": 1},
    "5 x 5, halved": {"kernel_size": 5, "stride": 2},
    "with bias": {"kernel_size": 7, "padding": 3, "bias": True},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
}


def convolution(**options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(16, 16, groups=16, **{"bias": False} | options)


def faster(module: nn.Conv2d) -> nn.Conv2d:
    model = nn.Sequential(copy.deepcopy(module))
    use_depthwise(model)
    return model[0]


def gradients(module: nn.Conv2d, images: torch.Tensor, enabled: bool = True):
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out = module(images)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out, images.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_are_those_of_torch_and_gradients_those_of_fp32(shape):
    theirs = convolution(**SHAPES[shape])
    ours, images = faster(theirs), torch.randn(4, 16, 12, 9)
    found, bf16 = gradients(ours, images), gradients(copy.deepcopy(theirs), images)
    assert type(ours) is DepthwiseConv2d and found[0].equal(bf16[0])
    assert type(found[0].grad_fn).__name__ == "_ConvolutionBackward"
    # In fp32, of the images and weights as bf16 has them.
    rounded = copy.deepcopy(theirs).to(torch.bfloat16).float()
    exact = gradients(rounded, images.bfloat16().float(), enabled=False)
    for ours_, exact_, bf16_ in zip(found[1:], exact[1:], bf16[1:], strict=True):
        scale = exact_.abs().max()
        assert (ours_ - exact_).abs().max() <= 2**-7 * scale
        assert (ours_ - exact_).abs().max() <= (bf16_ - exact_).abs().max() + 2**-8 * scale


def test_in_fp32_and_without_gradients_it_is_torchs():
    theirs, images = convolution(kernel_size=3), torch.randn(2, 16, 8, 8)
    ours = faster(theirs)
    for one, other in zip(gradients(ours, images, False), gradients(theirs, images, False)):
        assert one.equal(other)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(images).equal(theirs(images))


@pytest.mark.parametrize("others", [{"groups": 4}, {"groups": 1}, {"padding_mode": "circular"}])
def test_other_convolutions_stay(others):
    module = nn.Conv2d(16, 16, 3, padding=1, **{"groups": 16} | others)
    assert type(faster(module)) is nn.Conv2d


def test_names_weights_and_pickling_stay():
    ours = faster(convolution(kernel_size=3, padding="same"))
    assert [*ours.state_dict()] == ["weight"]
    again = pickle.loads(pickle.dumps(ours))
    assert gradients(again, torch.randn(2, 16, 8, 8))[0].dtype == torch.bfloat16
