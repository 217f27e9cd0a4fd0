"""Initial weights from a file of this or another program, adapted to a model."""

import difflib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from cnn.errors import Refused
from cnn.utils.checked_zip import read_archive
from cnn.utils.screen import list_some, shorten_name

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]  # by name, as in a state dict
Shapes = dict[str, torch.Size]  # of a model's tensors, by name

# The entries of a file in which programs save the weights, averaged ones (EMA) first. An entry can
# contain further ones.
ENTRIES = (
    *("ema_state_dict", "state_dict_ema", "model_ema"),
    *("model_state_dict", "state_dict", "model_dict", "model", "net", "module"),
)
# What wrappers such as DataParallel, torch.compile and Lightning put before the names.
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|model|backbone|net|encoder)\.)+")
DENSE_LAYERS = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")  # in torchvision's files
COUNTER = "num_batches_tracked"  # of batch norm; some files lack it, and nothing depends on it
STATISTICS = ("running_mean", "running_var")  # of batch norm
MIN_SHARE = 0.9  # of the parameters of the model's backbone, that a file has to fit
NUM_PAIRS = 3  # names of the model and of the file side by side in a message


def read_weights(path: Path) -> tuple[Tensors, list[str]]:
    """Reads the weights in a checkpoint or state dict of this or another program.

    Args:
        path: a file that torch.save wrote, or a file of safetensors.

    Returns:
        Two values. The first is a dict from names to tensors. If a checkpoint has averaged weights
        (EMA), the dict has the averaged weights. The second is the names of the classes, in the
        order of the logits. The list is empty if the file does not name every class once.

    Raises:
        Refused: the file is missing or damaged, contains a whole module, or contains NaN.
    """
    try:
        content = _read_file(path)
        state = _find_weights(content) if isinstance(content, dict) else {}
    except Exception as error:  # noqa: BLE001  whatever torch raises on a foreign file
        foreign = f"{path}: not a file of torch.save, or a damaged one"
        reason = error if isinstance(error, Refused) else foreign
        advice = "expected what torch.save(model.state_dict(), FILE) writes"
        raise Refused(f"model.weights: {reason}; {advice}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise Refused(f"model.weights: {path}: expected weights by name, got {kind}")
    invalid = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if invalid:
        raise Refused(f"model.weights: {path}: {invalid[0]} contains NaN or infinite numbers")
    names = content.get("classes")
    is_known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return state, names if is_known and len(set(names)) == len(names) else []


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors" and path.is_file():
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise Refused(f"{path}: needs a package: pip install safetensors") from None
        return load_file(path)
    if not path.is_file() or is_zipfile(path):
        return read_archive(path)
    # The format before torch 1.6, which has no checksums.
    return torch.load(path, map_location="cpu", weights_only=True)


def _find_weights(content: dict[Any, Any]) -> Tensors:
    """Returns the weights in a checkpoint of any program, which are empty if there are none."""
    parts = [content[entry] for entry in ENTRIES if isinstance(content.get(entry), dict)]
    found = next(filter(None, map(_find_weights, parts)), None)
    return found or {str(k): v for k, v in content.items() if torch.is_tensor(v)}


def use_names(state: Tensors, names: Collection[str]) -> Tensors:
    """Returns the weights of a file by the names that a model uses.

    Wrappers put prefixes such as "module." or "model." before names. A tensor of the file belongs
    to the tensor of the model that has the same name, or the same name without such prefixes. A
    tensor that belongs to none keeps its name, without the prefixes.

    Args:
        state: the weights in the file by name.
        names: the names of the model's tensors.

    Raises:
        Refused: two tensors of the file belong to the same tensor of the model.
    """
    ours = {PREFIXES.sub("", name): name for name in names}
    found, origins = {}, {}
    for key, tensor in state.items():
        plain = DENSE_LAYERS.sub(r"\1\2", PREFIXES.sub("", key))
        name = key if key in names else ours.get(plain, plain)
        if name in found:
            both = f"{origins[name]} and {key} could both be {name}"
            raise Refused(f"model.weights: {both}; save only one of the models in the file")
        found[name], origins[name] = tensor, key
    return found


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


def load_weights(
    model: nn.Module, source: str, state: Tensors, note: str, *, partial: bool
) -> list[str]:
    """Loads the fitting weights of a file into a model.

    A weight fits if the model has a weight of the same name and shape. The weights of the first
    convolution are distributed evenly over the model's channels. The model's other weights stay
    unchanged. A log message says what was loaded, what is new, and what of the file is left over.

    Args:
        model: the model, changed in place.
        source: where the weights come from, for messages.
        state: the weights by name.
        note: the end of the log message.
        partial: whether to go on though the file seems to be of another model.

    Returns:
        The names of the model's parameters that were not loaded.

    Raises:
        Refused: no weights fit. Or `partial` is false, and less than 90 % of the parameters outside
            of the head fit, the file has further blocks, or it lacks statistics of batch norm.
    """
    expected = model.state_dict()
    first = f"{_first_convolution(model)[0]}.weight"
    if first in state and first in expected and state[first].ndim == expected[first].ndim == 4:
        state = {**state, first: _adapt_channels(state[first], expected[first].shape[1])}
    fitting = {k: v for k, v in state.items() if k in expected and _fits(v, expected[k])}
    new = [name for name, _ in model.named_parameters() if name not in fitting]
    if len(new) == len([*model.parameters()]):
        raise Refused(f"model.weights: no tensor in {source} fits the model")
    left = [k for k in state if k not in fitting and not k.endswith(COUNTER)]
    if not partial:
        _check_fit(model, source, state, new, left)
        lacking = [k for k in expected if k.endswith(STATISTICS) and k not in fitting]
        if lacking := [k for k in lacking if f"{k.rpartition('.')[0]}.weight" in fitting]:
            advice = "to begin without: model.partial_weights=true"
            raise Refused(f"model.weights: {source} lacks {list_some(lacking)}; {advice}")
    model.load_state_dict(fitting, strict=False)
    fresh = [k for k in expected if k not in fitting and not k.endswith(COUNTER)]
    over, news = f", left over: {list_some(left)}" if left else "", list_some(fresh) or "nothing"
    fit = f"{len(fitting)} of {len(state)} tensors{over}"
    logger.info("weights from %s: %s; new: %s%s", source, fit, news, note)
    return new


def _fits(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    is_float = tensor.is_floating_point()  # a whole number can be a quantized weight
    return tensor.shape == own.shape and is_float == own.is_floating_point()


def _check_fit(
    model: nn.Module, source: str, state: Tensors, new: list[str], left: list[str]
) -> None:
    """Raises Refused if weights seem to be of another model.

    Args:
        model: the model.
        source: where the weights come from, for messages.
        state: the weights by name.
        new: the names of the model's parameters that do not fit.
        left: the names in `state` that do not fit.
    """
    parameters, head = dict(model.named_parameters()), last_linear(model)
    sizes = {name: p.numel() for name, p in parameters.items() if name not in head}
    share = 1 - sum(sizes.get(name, 0) for name in new) / max(1, sum(sizes.values()))
    # A network of the same family with more layers has all tensors of this one, and others.
    parts = {name.partition(".")[0] for name in sizes.keys() - set(new)}
    layers = dict(model.named_modules())
    further = [name for name in left if name.rpartition(".")[0] not in layers]
    blocks = [name for name in further if name.partition(".")[0] in parts]
    if share >= MIN_SHARE and not blocks:
        return
    pairs = []
    for name in [name for name in new if name in sizes][:NUM_PAIRS]:
        near = difflib.get_close_matches(name, left, 1, cutoff=0)
        theirs = f"{near[0]} ({_shape(state[near[0]])})" if near else "nothing"
        pairs.append(f"{name} ({_shape(parameters[name])}) here, {theirs} there")
    pairs += [f"{name} there, nothing here" for name in blocks[:NUM_PAIRS]]
    found = f"{share:.0%} of the parameters of the backbone fit, {len(further)} tensors are more"
    advice = "to take what fits: model.partial_weights=true"
    reason = f"{source} seems to be of another model: {found}: {'; '.join(pairs)}; {advice}"
    raise Refused(f"model.weights: {reason}")


def last_linear(model: nn.Module) -> list[str]:
    """Returns the names of the parameters of the last linear layer, or of the last layer at all."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
    }
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    name = (linear or list(layers) or [""])[-1]
    own = model.get_submodule(name).named_parameters(name, recurse=False)
    return [name for name, _ in own]


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


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
