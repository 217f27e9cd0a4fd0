"""Grad-CAM: where in an image a convolutional network sees a class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnn.errors import Refused

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
        Refused: the model is a transformer, or no layer has an output with a height and a width.
    """
    kinds = {type(layer).__name__ for layer in model.modules()}
    if attention := next((kind for kind in sorted(kinds) if kind.endswith("Attention")), None):
        raise Refused(f"Grad-CAM is for convolutional networks, and this one has {attention}")
    last: list[Tensor] = []

    def keep(_layer: nn.Module, _given: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
            last[:] = [output]

    hooks = [layer.register_forward_hook(keep) for layer in model.modules()]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            if not last:
                raise Refused("Grad-CAM: no layer of this model has height and width")
            (slopes,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), last)
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
