"""A model of your own: a convolution with large strides, as Vision Transformers begin with.

python train.py model.name=examples.own_model:Patches model.args="{width: 64}"
"""

from torch import Tensor, nn


class Patches(nn.Sequential):
    def __init__(self, num_classes: int, in_channels: int, width: int = 32, patch: int = 4):
        super().__init__(
            nn.Conv2d(in_channels, width, patch, stride=patch),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:  # N, C, H, W
        return super().forward(images)  # N, num_classes: logits
