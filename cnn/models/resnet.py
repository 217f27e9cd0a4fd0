"""Residual networks for small images: ResNet-9 and ResNet-20."""

import torch
from torch import nn
from torch.nn import functional as F

from cnn.models.simple_cnn import conv_bn, conv_bn_relu, pool_relu


class ResNet9(nn.Module):
    """ResNet-9, the network of D. Page, "How to Train Your ResNet" (2018).

    The network takes images of at least 8 x 8 pixels.

    Args:
        num_classes: number of logits per image.
        in_channels: number of image channels.
        width: number of channels after the first convolution. The last convolution has eight times
            as many channels.
        scale: factor by which the logits are multiplied, 0.125 in Page's network.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 64, scale: float = 0.125):
        super().__init__()
        self.scale = scale
        self.stem = conv_bn_relu(in_channels, width)
        # N, 2 width, H/2, W/2; then 4 width, H/4, W/4; then 8 width, H/8, W/8
        self.layer1 = nn.Sequential(conv_bn(width, 2 * width), pool_relu(), Residual(2 * width))
        self.layer2 = nn.Sequential(conv_bn(2 * width, 4 * width), pool_relu())
        self.layer3 = nn.Sequential(conv_bn(4 * width, 8 * width), pool_relu(), Residual(8 * width))
        self.classifier = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        """Returns the logits (N, num_classes) of a batch of images (N, C, H, W)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(images))))
        # AdaptiveMaxPool2d(1) gives the same bits, but its backward on CUDA is not repeatable.
        pooled = F.max_pool2d(features, features.shape[2:]).flatten(1)  # N, 8 width
        return self.classifier(pooled) * self.scale  # N, num_classes


class Residual(nn.Module):
    """A residual block that adds the input to the output of two convolutions.

    Each convolution is followed by batch norm and ReLU.

    Args:
        channels: number of channels of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(*(conv_bn_relu(channels, channels) for _ in range(2)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the output of the block.

        Args:
            features: the input, (N, channels, H, W).

        Returns:
            The output, of the same shape as the input.
        """
        return features + self.body(features)


class ResNet20(nn.Module):
    """ResNet-20, the network for CIFAR in section 4.2 of He et al. (2016).

    Args:
        num_classes: number of logits per image.
        in_channels: number of image channels.
        blocks: number of residual blocks in each of the three stages. 3 blocks give 20 layers. 9
            blocks give 56 layers.
        width: number of channels in the first stage, 16 in the paper. Each further stage has twice
            as many channels as the stage before.
    """

    def __init__(self, num_classes: int, in_channels: int, blocks: int = 3, width: int = 16):
        super().__init__()
        self.stem = conv_bn_relu(in_channels, width)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.stages = nn.Sequential(*map(BasicBlock, [width, *widths], widths))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # He et al. (2015), as in the paper

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        """Returns the logits (N, num_classes) of a batch of images (N, C, H, W)."""
        features = self.stages(self.stem(images))  # N, 4 width, H/4, W/4
        return self.classifier(self.pool(features).flatten(1))  # N, num_classes


class BasicBlock(nn.Module):
    """A residual block that adds the input to the output of two convolutions.

    ReLU is applied to the sum. If the output has more channels than the input, the output has half
    the height and width. Every second row and column of the input is then added, and channels of
    zeros are appended to the input (option A of He et al., 2016).

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output, at least `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.added_channels = out_channels - in_channels
        self.stride = 2 if self.added_channels else 1
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the output of the block.

        Args:
            features: the input, (N, in_channels, H, W).

        Returns:
            The output, (N, out_channels, H / stride, W / stride). The quotients are rounded up.
        """
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        out = self.bn2(self.conv2(out))
        shortcut = features[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added_channels))
        return F.relu(out + shortcut, inplace=True)
