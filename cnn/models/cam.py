"""Grad-CAM: where in an image a convolutional network sees a class."""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.errors import Refused

ATTENTION = re.compile(r"(Window|Multi[Hh]ead).*Attention")
NOT_CONVOLUTIONAL = "Grad-CAM is for convolutional networks, and this one has"
SHOWN = 0.6  # how opaque the colour is at the maximum
COLOUR = (255, 60, 0)


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Computes the class activation maps of images (Grad-CAM, Selvaraju et al., ICCV 2017).

    The maps come from the last output of a layer that has a height and a width.

    Args:
        model: the network in evaluation mode, which stays unchanged.
        images: the normalized images, float32 (N, C, H, W).
        classes: the index of the class of each map, int64 (N).

    Returns:
        The maps, float32 (N, H, W), from 0 to 1. A map is 0 if nothing speaks for the class.

    Raises:
        Refused: the model computes with tokens, as a transformer does, or no layer has an output
            with a height and a width.
    """
    kinds = {type(layer).__name__ for layer in model.modules()}
    if attention := next(filter(ATTENTION.search, sorted(kinds)), None):
        raise Refused(f"{NOT_CONVOLUTIONAL} {attention}")
    last: list[Tensor] = []

    @torch.enable_grad()
    def keep(layer: nn.Module, _given: object, output: object) -> object:
        if isinstance(layer, nn.Linear) and output.dim() == 3:
            raise Refused(f"{NOT_CONVOLUTIONAL} Linear layers on tokens")
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
            # What comes before needs no gradients, which would take much memory.
            last[:] = [output.detach().requires_grad_().clone()]
            return last[0]
        return output

    hooks = [layer.register_forward_hook(keep) for layer in model.modules()]
    try:
        with torch.enable_grad():
            score, slopes = model(images).gather(1, classes[:, None]).sum(), None
            if last and score.requires_grad:
                (slopes,) = torch.autograd.grad(score, last, allow_unused=True)
            if slopes is None:
                raise Refused("Grad-CAM: no layer with height and width decides on the class")
    finally:
        for hook in hooks:
            hook.remove()
    weights = slopes.mean((2, 3), keepdim=True)
    maps = (weights * last[0].detach()).sum(1, keepdim=True).relu().float()
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """Returns an image in gray with a map on it in colour, uint8 (3, H, W).

    Args:
        image: uint8 (1 or 3, H, W).
        heat: the map, from 0 to 1 (H, W).
    """
    share, gray = SHOWN * heat.cpu(), image.cpu().float().mean(0, keepdim=True)
    colour = torch.tensor(COLOUR)[:, None, None]
    return (gray * (1 - share) + colour * share).round().to(torch.uint8)
