"""Convolutions over small feature maps: another way to the same gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cnn.config import load_config
from cnn.models import small_maps
from cnn.models.resnet import ResNet9
from cnn.training.setup import build_run
from cnn.utils import environment


def gradients(module, images):
    """Output, and the gradients of images and weight of a sum that tells the places apart."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(images)
    weights = torch.arange(out.numel(), dtype=torch.float32).cos().view_as(out)
    (out.float() * weights).sum().backward()
    return out, images.grad, module.weight.grad


def with_small_maps(module: nn.Conv2d) -> nn.Conv2d:
    model = nn.Sequential(module)
    small_maps.use_small_maps(model)
    return model[0]


def used(out):
    return type(out.grad_fn).__name__ == "_ConvolutionBackward"


@pytest.mark.parametrize("number", [16, 6, 7])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (4, 4), (7, 7), (8, 8), (5, 3)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_the_gradients_are_those_of_torchs_convolution(number, height, width, kernel):
    torch.manual_seed(0)
    theirs = nn.Conv2d(3, 4, kernel, padding=kernel // 2, bias=False)
    ours = with_small_maps(copy.deepcopy(theirs))
    images = torch.randn(number, 3, height, width)
    expected, found = gradients(theirs, images), gradients(ours, images)
    assert used(found[0]) and not used(expected[0])
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])
    # Of the weight only the order of the sum is another, before it is rounded to bf16; without
    # instructions for bf16, what torch adds up is rounded on the way.
    exact = environment.cpu_has("avx512_bf16", "amx_bf16")
    torch.testing.assert_close(found[2], expected[2], rtol=2**-7, atol=0.02 if exact else 0.5)
    again = copy.deepcopy(ours)
    again.weight.grad = None
    assert gradients(again, images)[2].equal(found[2])


def test_maps_are_laid_side_by_side_with_zeros_between():
    maps = torch.arange(1.0, 13).view(4, 1, 1, 3)
    row = small_maps.side_by_side(maps, 2, 1)
    assert row.tolist() == [[[[1, 2, 3, 0, 4, 5, 6, 0]]], [[[7, 8, 9, 0, 10, 11, 12, 0]]]]
    assert row.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 1, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "bias": True},
        {"padding": "same"},
    ],
)
def test_other_convolutions_stay_as_they_are(settings):
    module = with_small_maps(nn.Conv2d(4, 4, 3, **{"bias": False} | settings))
    assert type(module) is nn.Conv2d


def test_wide_maps_fp32_and_evaluation_take_torchs_way():
    module = with_small_maps(nn.Conv2d(3, 4, 3, padding=1, bias=False))
    assert not used(gradients(module, torch.randn(2, 3, 4, 9))[0])
    assert not used(module(torch.randn(2, 3, 4, 4)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(torch.randn(2, 3, 4, 4)).grad_fn is None


def test_a_gradient_can_be_differentiated_again():
    module = with_small_maps(nn.Conv2d(3, 4, 3, padding=1, bias=False))
    images = torch.randn(4, 3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(images).square().sum()
    (first,) = torch.autograd.grad(out, images, create_graph=True)
    first.square().sum().backward()
    assert module.weight.grad.isfinite().all() and module.weight.grad.any()


def test_a_model_keeps_its_weights_names_and_looks():
    model = ResNet9(10, 3, width=4)
    before, names = str(model), list(model.state_dict())
    small_maps.use_small_maps(model)
    assert str(model) == before and list(model.state_dict()) == names
    again = pickle.loads(pickle.dumps(model))
    shallow = copy.copy(model.stem[0])
    assert type(again.stem[0]) is type(shallow) is type(model.stem[0]) is small_maps.Conv2d


@pytest.mark.parametrize(
    "precision, has_amx, compile, expected",
    [
        ("bf16", True, False, True),
        ("bf16", False, False, False),
        ("fp32", True, False, False),
        ("bf16", True, True, False),
    ],
)
def test_a_run_uses_it_in_bf16_on_a_cpu_that_gains(
    monkeypatch, precision, has_amx, compile, expected
):
    monkeypatch.setattr(environment, "cpu_has", lambda *features: has_amx)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    settings = ["data.name=synthetic", "device=cpu", f"train.precision={precision}"]
    cfg, _ = load_config(None, [*settings, f"train.compile={str(compile).lower()}"])
    model = build_run(cfg).state.model
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(module) is small_maps.Conv2d for module in convolutions} == {expected}
