"""Initial weights from a file, adapted to the number of classes and of image channels."""

import logging
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from cnn.errors import Refused
from cnn.utils.checked_zip import read_archive

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the fitting weights of a file into a model.

    A weight fits if the model has a weight of the same name and shape. The model's other weights
    stay unchanged, and a log message lists the names. The file is a checkpoint of this project or a
    state dict that torch.save wrote. If a checkpoint has averaged weights (EMA), the averaged
    weights are loaded.

    Args:
        model: the model, changed in place.
        path: the path of the file.

    Raises:
        Refused: the file is missing or damaged, contains NaN, or has no weights that fit.
    """
    try:
        if not path.is_file() or is_zipfile(path):
            state = read_archive(path)
        else:  # the format before torch 1.6, which has no checksums
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Refused as refusal:
        raise Refused(f"model.weights: {refusal}") from None
    except Exception as error:  # noqa: BLE001  whatever torch raises on a foreign file
        damaged = f"not a file of torch.save, or a damaged one ({type(error).__name__})"
        raise Refused(f"model.weights: {path}: {damaged}") from None
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise Refused(f"model.weights: {path}: expected weights by name, got {kind}")
    state = state.get("ema_state_dict") or state.get("model_state_dict", state)
    state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    invalid = [k for k, v in state.items() if v.is_floating_point() and v.isnan().any()]
    if invalid:
        raise Refused(f"model.weights: {path}: {invalid[0]} contains NaN")
    not_loaded = load_matching(model, state)
    parameters = {name for name, _ in model.named_parameters()}
    missing = [name for name in not_loaded if name in parameters]
    if len(missing) == len(parameters):
        raise Refused(f"model.weights: no tensor in {path} fits the model")
    logger.info("weights from %s; new: %s", path, ", ".join(missing) or "nothing")


def load_matching(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Loads the tensors of a state dict that fit a model.

    A tensor fits if the model has a tensor of the same name and shape. The first convolution is
    loaded even if the number of image channels differs. The weights of the first convolution are
    then distributed evenly over the model's channels.

    Args:
        model: the model, changed in place.
        state: a dict from names to tensors.

    Returns:
        The names of the model's parameters and buffers that were not loaded.
    """
    expected = model.state_dict()
    first = f"{_first_convolution(model)[0]}.weight"
    if first in state and first in expected and state[first].ndim == expected[first].ndim == 4:
        state = {**state, first: _adapt_channels(state[first], expected[first].shape[1])}
    fitting = {k: v for k, v in state.items() if k in expected and expected[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return [key for key in expected if key not in fitting]


def adapt_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Gives the first convolution of a model another number of input channels.

    The sum of the weights is distributed evenly over the new channels. An image with equal channels
    has the same features as before. A model without convolution stays unchanged.

    Args:
        model: the model. The first convolution of the model is replaced in place.
        in_channels: the new number of image channels.
    """
    name, old = _first_convolution(model)
    if old is None:
        return
    shape = (old.kernel_size, old.stride, old.padding)
    new = nn.Conv2d(in_channels, old.out_channels, *shape, bias=old.bias is not None)
    with torch.no_grad():
        new.weight.copy_(_adapt_channels(old.weight, in_channels))
        if old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    return "", None


def _adapt_channels(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """Distributes the weights of a convolution evenly over another number of input channels.

    The sum of the weights over the channels stays the same. If the number of channels stays the
    same, the same tensor is returned.

    Args:
        weight: the weights, (out channels, in channels, kernel height, kernel width).
        in_channels: the new number of input channels.

    Returns:
        The weights, (out channels, in_channels, kernel height, kernel width).
    """
    if weight.shape[1] == in_channels:
        return weight
    mean = weight.sum(1, keepdim=True) / in_channels
    return mean.expand(-1, in_channels, -1, -1)
