"""Any classification model of torchvision, with its head and first convolution made to fit."""

import difflib
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from cnn.config import Refused

AUXILIARY_HEADS = ("googlenet", "inception_v3")  # give several outputs unless told not to


def build(name: str, num_classes: int, in_channels: int, pretrained: bool, args: dict[str, Any]):
    """Builds the model; with `pretrained`, from torchvision's best weights for it, but the head.

    Raises:
        Refused: no such model, a keyword that it does not take, or weights that cannot be fetched.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        ours = ["simple_cnn", "lenet5", "resnet9", "resnet20"]
        near = difflib.get_close_matches(name, ours + known, n=1)
        hint = f" — did you mean '{near[0]}'?" if near else ""
        raise Refused(
            f"model.name: expected {', '.join(ours)}, a torchvision classification model such as"
            f" resnet18, or package.module:Class; got {name}{hint}"
        )
    if name in AUXILIARY_HEADS:
        args = {"aux_logits": False, "init_weights": True} | args
    try:
        model = models.get_model(name, weights=None, num_classes=num_classes, **args)
    except (TypeError, ValueError) as error:
        raise Refused(f"model.args: {name}: {error}") from None
    if pretrained:
        load_matching(model, _fetch(models.get_model_weights(name).DEFAULT, name))
    if in_channels != 3:
        adapt_first_convolution(model, in_channels)
    return model


def _fetch(weights: Any, name: str) -> dict[str, torch.Tensor]:
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        file = weights.url.rsplit("/", 1)[-1]
        raise Refused(
            f"model.pretrained: cannot fetch the weights of {name} ({error});\n"
            f"  without internet, fetch {weights.url} elsewhere, copy the file here, and say"
            f" model.weights={file}"
        ) from None


def load_matching(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Loads every tensor whose name and shape fit; returns the names of the model's others.

    The first convolution's weights are made to fit another number of channels.
    """
    own = model.state_dict()
    first = f"{_first_convolution(model)[0]}.weight"
    if first in state and first in own and state[first].ndim == own[first].ndim == 4:
        state = {**state, first: _for_channels(state[first], own[first].shape[1])}
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return [key for key in own if key not in fitting]


def adapt_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Makes the first convolution take another number of channels."""
    name, old = _first_convolution(model)
    if old is None:
        return
    shape = (old.kernel_size, old.stride, old.padding)
    new = nn.Conv2d(in_channels, old.out_channels, *shape, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(_for_channels(old.weight, in_channels))
        if old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    return "", None


def _for_channels(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """The weights over all channels summed and shared out evenly over the new ones, so that a gray
    image gives what the same image in RGB gave."""
    if weight.shape[1] == in_channels:
        return weight
    shared = weight.sum(1, keepdim=True) / in_channels
    return shared.expand(-1, in_channels, -1, -1)
