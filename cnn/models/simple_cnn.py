"""Three convolution blocks and a linear layer: small, quick, good for small images."""

import torch
from torch import nn


class SimpleCNN(nn.Module):
    """Takes images of any size from 4 x 4 on.

    Args:
        width: channels of the first block; the others have two and four times as many.
        dropout: share of the features dropped before the last layer.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int = 32, dropout: float = 0.2):
        super().__init__()
        self.features = nn.Sequential(
            convolution(in_channels, width),
            halving(),
            convolution(width, 2 * width),
            halving(),
            block(2 * width, 4 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        features = self.features(images)  # N, 4 width, H/4, W/4
        features = self.pool(features).flatten(1)  # N, 4 width
        return self.classifier(self.dropout(features))  # N, num_classes


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    return convolution(in_channels, out_channels).append(nn.ReLU(inplace=True))


def halving() -> nn.Sequential:
    """What pooling after a ReLU gives, bit for bit, with a quarter of the ReLU's work."""
    return nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True))
