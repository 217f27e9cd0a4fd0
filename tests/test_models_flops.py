"""Floating-point operations: as torch counts them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cnn.config import ModelConfig
from cnn.models.build import build_model
from cnn.models.flops import count_flops

ATTENTION = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16}


def torchs_own(model, shape):
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name, args",
    [
        ("simple_cnn", {"width": 4}),
        ("lenet5", {}),
        ("resnet9", {"width": 8}),
        ("mobilenet_v3_small", {"width_mult": 0.2}),  # convolutions in groups
    ],
)
def test_operations_are_counted_as_torch_does(name, args):
    model, _ = build_model(ModelConfig(name, args=args), list("abcde"), 3, 32, 0)
    counted = count_flops(model, (3, 32, 32))
    assert model.training, "as it was"
    assert counted == torchs_own(model, (3, 32, 32)) > 1000


def test_attention_and_transposed_convolutions_are_counted():
    from torchvision.models import VisionTransformer

    transformer = VisionTransformer(mlp_dim=32, num_classes=5, **ATTENTION)
    assert count_flops(transformer, (3, 32, 32)) == torchs_own(transformer, (3, 32, 32))
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.Conv2d(8, 4, 3, 2, groups=4))
    # 8 x 8 places of the small image, kernel 3 x 3 x 3 x 8; then 8 x 8 places, 4 kernels of 3 x 3 x 2
    assert count_flops(model, (3, 8, 8)) == 2 * 64 * 216 + 2 * 64 * 72
    assert count_flops(model, (3, 8, 8)) == torchs_own(model, (3, 8, 8))


def test_resnet9_of_width_32_has_two_tenths_of_a_gflop_an_image():
    model, _ = build_model(ModelConfig("resnet9", args={"width": 32}), list("0123456789"), 3, 32, 0)
    assert count_flops(model, (3, 32, 32)) == pytest.approx(0.19e9, rel=0.05)
