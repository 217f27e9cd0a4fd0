"""LeNet-5 (LeCun et al., 1998), with ReLU and max pooling as it is built today."""

import torch
from torch import nn
from torch.nn import functional as F


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998), with ReLU and max pooling.

    The network is made for images of 28 x 28 pixels. Images of other sizes, at least 12 x 12, are
    accepted, too. The feature maps of such images are brought to 5 x 5 by average pooling.

    Args:
        num_classes: number of logits per image.
        in_channels: number of image channels.
        dropout: probability of dropout after each of the two hidden linear layers.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float = 0.0):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2),  # N, 6, 28, 28
            nn.MaxPool2d(2),  # N, 6, 14, 14; before the ReLU: the same values with less work
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 16, 5),  # N, 16, 10, 10
            nn.MaxPool2d(2),  # N, 16, 5, 5
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        """Returns the logits (N, num_classes) of a batch of images (N, C, H, W)."""
        features = self.features(images)
        if features.shape[-2:] != (5, 5):  # not 28 x 28; else the pooling would only take time
            features = F.adaptive_avg_pool2d(features, 5)
        return self.classifier(features.flatten(1))  # N, num_classes
