"""Initial weights from a file, adapted to the number of classes and of image channels."""

import logging
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from cnn.errors import Refused
from cnn.utils.checked_zip import read_archive
from cnn.utils.screen import list_some, shorten_name

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]  # by name, as in a state dict
Shapes = dict[str, torch.Size]  # of a model's tensors, by name


def read_weights(path: Path) -> tuple[Tensors, list[str]]:
    """Reads the weights in a checkpoint of this project or in a state dict that torch.save wrote.

    Args:
        path: the path of the file.

    Returns:
        Two values. The first is a dict from names to tensors. If a checkpoint has averaged weights
        (EMA), the dict has the averaged weights. The second is the names of the classes, in the
        order of the logits. The list is empty if the file does not name every class once.

    Raises:
        Refused: the file is missing or damaged, or contains NaN.
    """
    try:
        if not path.is_file() or is_zipfile(path):
            content = read_archive(path)
        else:  # the format before torch 1.6, which has no checksums
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  whatever torch raises on a foreign file
        foreign = f"{path}: not a file of torch.save, or a damaged one ({type(error).__name__})"
        reason = error if isinstance(error, Refused) else foreign
        raise Refused(f"model.weights: {reason}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise Refused(f"model.weights: {path}: expected weights by name, got {kind}")
    parts = (content.get("ema_state_dict"), content.get("model_state_dict"))
    state = next((part for part in parts if isinstance(part, dict) and part), content)
    state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    invalid = [k for k, v in state.items() if v.is_floating_point() and v.isnan().any()]
    if invalid:
        raise Refused(f"model.weights: {path}: {invalid[0]} contains NaN")
    names = content.get("classes")
    is_known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return state, names if is_known and len(set(names)) == len(names) else []


def arrange_head(
    model: nn.Module, state: Tensors, known: list[str], classes: list[str], wider: Shapes
) -> str:
    """Arranges the rows of the head in the weights of a file by the names of a model's classes.

    The head consists of the tensors with one row per class. In a model with one class more, these
    tensors have one row more, and all other tensors have the same shape. A class that the file does
    not have gets the rows of the model. If the file has none of the classes, the head is removed
    from the weights. A tensor of the head whose rows have another shape is removed, too.

    Args:
        model: the model, which stays unchanged.
        state: the weights in the file by name, changed in place.
        known: the names of the classes in the file, in the order of the rows.
        classes: the names of the model's classes, in the order of the rows.
        wider: the shapes of the same model with one class more, by the names of the tensors.

    Returns:
        The end of a log message, with the names of the classes.

    Raises:
        Refused: another number of classes changes the model in another way, or the file does not
            have one row per name.
    """
    own, shapes = model.state_dict(), shapes_of(model)
    head = {key: shape[1:] for key, shape in shapes.items() if shape != wider.get(key)}
    here, there = ({k: (n, *head[k]) for k in head} for n in (len(classes), len(classes) + 1))
    saved = {key: state.pop(key) for key in head if key in state}
    saved = {key: tensor for key, tensor in saved.items() if tensor.shape[1:] == head[key]}
    has_rows = all(tensor.shape[:1] == (len(known),) for tensor in saved.values())
    if not (head and has_rows and shapes == shapes | here and wider == shapes | there):
        reason = "the file's classes are not the data's, and its rows cannot be told apart by class"
        advice = "a file of weights that names no classes is loaded by shape"
        raise Refused(f"model.weights: {reason}; {advice}")
    rows = {name: row for row, name in enumerate(known)} if saved else {}
    kept = dict.fromkeys(name for name in classes if name in rows)
    new = [name for name in classes if name not in kept]
    left_out = [name for name in known if name not in kept]
    # Row by row from the file, or, after the file's rows, from the model.
    order = [rows.get(name, len(known) + row) for row, name in enumerate(classes)]
    state |= {k: torch.cat([v, own[k]])[order] for k, v in saved.items() if kept}
    return f"; classes kept: {_listed([*kept])}; new: {_listed(new)}; left out: {_listed(left_out)}"


def shapes_of(model: nn.Module) -> Shapes:
    """Returns the shapes of a model's parameters and buffers by name."""
    return {k: v.shape for k, v in model.state_dict().items() if torch.is_tensor(v)}


def _listed(names: list[str]) -> str:
    return list_some([shorten_name(name) for name in names]) or "none"


def load_weights(model: nn.Module, path: Path, state: Tensors, note: str) -> None:
    """Loads the fitting weights of a file into a model.

    A weight fits if the model has a weight of the same name and shape. The model's other weights
    stay unchanged, and a log message lists the names.

    Args:
        model: the model, changed in place.
        path: the path of the file, for messages.
        state: the weights in the file by name.
        note: the end of the log message.

    Raises:
        Refused: no weights fit.
    """
    missing = load_matching(model, state)
    if len(missing) == len([*model.parameters()]):
        raise Refused(f"model.weights: no tensor in {path} fits the model")
    logger.info("weights from %s; new: %s%s", path, ", ".join(missing) or "nothing", note)


def load_matching(model: nn.Module, state: Tensors) -> list[str]:
    """Loads the tensors of a state dict that fit a model.

    A tensor fits if the model has a tensor of the same name and shape. The first convolution is
    loaded even if the number of image channels differs. The weights of the first convolution are
    then distributed evenly over the model's channels.

    Args:
        model: the model, changed in place.
        state: a dict from names to tensors.

    Returns:
        The names of the model's parameters that were not loaded.
    """
    expected = model.state_dict()
    first = f"{_first_convolution(model)[0]}.weight"
    if first in state and first in expected and state[first].ndim == expected[first].ndim == 4:
        state = {**state, first: _adapt_channels(state[first], expected[first].shape[1])}
    fitting = {k: v for k, v in state.items() if k in expected and expected[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    return [name for name, _ in model.named_parameters() if name not in fitting]


def adapt_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Gives the first convolution of a model another number of input channels.

    The sum of the weights is distributed evenly over the new channels. An image with equal channels
    has the same features as before. A model without convolution stays unchanged.

    Args:
        model: the model. The first convolution of the model is changed in place.
        in_channels: the new number of image channels.
    """
    _, convolution = _first_convolution(model)
    if convolution is not None:
        weight = _adapt_channels(convolution.weight.detach(), in_channels)
        convolution.weight = nn.Parameter(weight.contiguous())
        convolution.in_channels = in_channels


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d | None]:
    found = (pair for pair in model.named_modules() if isinstance(pair[1], nn.Conv2d))
    return next(found, ("", None))


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
