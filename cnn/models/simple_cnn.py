"""A small, fast network for small images: three convolutions and a linear layer."""

import torch
from torch import nn


class SimpleCNN(nn.Module):
    """A small network of three convolutions and a linear layer.

    Each convolution is followed by batch norm and ReLU. The network takes images of at least 4 x 4
    pixels.

    Args:
        num_classes: number of logits per image.
        in_channels: number of image channels.
        width: number of channels after the first convolution. The second convolution has twice as
            many channels, the third convolution four times as many.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 32, dropout: float = 0.2):
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(in_channels, width),
            pool_relu(),
            conv_bn(width, 2 * width),
            pool_relu(),
            conv_bn_relu(2 * width, 4 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        """Returns the logits (N, num_classes) of a batch of images (N, C, H, W)."""
        features = self.features(images)  # N, 4 width, H/4, W/4
        features = self.pool(features).flatten(1)  # N, 4 width
        return self.classifier(self.dropout(features))  # N, num_classes


def conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns a 3 x 3 convolution followed by batch norm.

    The output has the same height and width as the input.
    """
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns a 3 x 3 convolution followed by batch norm and ReLU.

    The output has the same height and width as the input.
    """
    return conv_bn(in_channels, out_channels).append(nn.ReLU(inplace=True))


def pool_relu() -> nn.Sequential:
    """Returns 2 x 2 max pooling followed by ReLU.

    The other order would give the same bits, but ReLU would have four times the work.
    """
    return nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True))
