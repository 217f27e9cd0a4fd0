"""An augmentation of your own: noise, in every other image.

python train.py data.augment="[flip, examples.own_augmentation:noise]"

It draws from torch's global generator (numpy's and random's will do too), which is keyed by (seed,
epoch, image): so the run can be stopped anywhere.
"""

import torch


def noise(image: torch.Tensor) -> torch.Tensor:  # uint8 (C, H, W)
    if torch.rand(()) < 0.5:
        return image
    return (image + 10 * torch.randn(image.shape)).clamp(0, 255).to(torch.uint8)
