"""Weights to begin from: out of a file, made to fit the head's classes and the images' channels."""

import logging
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from cnn.errors import Refused
from cnn.utils.checked_zip import read_archive

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path) -> None:
    """Begins from the weights of a file: a checkpoint of ours or a state dict."""
    try:
        if not path.is_file() or is_zipfile(path):
            state = read_archive(path)
        else:  # the format of before torch 1.6, which has no checksums
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Refused as refusal:
        raise Refused(f"model.weights: {refusal}") from None
    except Exception as error:  # noqa: BLE001  whatever a strange file makes torch say
        raise Refused(
            f"model.weights: {path}: not a file of torch.save, or a damaged one"
            f" ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise Refused(
            f"model.weights: {path}: expected weights by name, got {type(state).__name__}"
        )
    state = state.get("ema_state_dict") or state.get("model_state_dict", state)
    state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    spoiled = [k for k, v in state.items() if v.is_floating_point() and v.isnan().any()]
    if spoiled:
        raise Refused(f"model.weights: {path}: {spoiled[0]} holds values that are no numbers (NaN)")
    left = load_matching(model, state)
    parameters = {name for name, _ in model.named_parameters()}
    missing = [name for name in left if name in parameters]
    if len(missing) == len(parameters):
        raise Refused(f"model.weights: no tensor in {path} fits the model")
    logger.info("weights from %s; new: %s", path, ", ".join(missing) or "nothing")


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
