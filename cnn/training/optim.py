"""The optimizer, and its groups of parameters by learning rate and weight decay."""

import functools
import inspect
import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnn.config import OptimConfig
from cnn.config.settings import PARTS
from cnn.errors import Refused
from cnn.models.weights import last_linear
from cnn.utils.importing import import_object
from cnn.utils.screen import list_some
from cnn.utils.signals import time_limit

logger = logging.getLogger(__name__)

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
}
PER_GROUP = {"lr", "weight_decay"}  # keyword arguments whose values differ from group to group
FREEZE = "freeze_epochs"  # key of the optimizer's groups that are frozen during the first epochs
# Settings that are no keyword arguments.
NO_KEYWORDS = {"name", "groups", "layer_decay", "freeze", FREEZE, "args"}
MATCH_TIMEOUT = 10  # seconds; some regular expressions would take longer than any run

# A block of a network: what comes before branches, such as inception3a, or the name up to the first
# numbers, such as layer1.0, encoder_layer_3 or stages.0.blocks.1.
BLOCK = re.compile(r"(?:(.*?)\.branch|((?:.*?[._-])?\d+(?:\.(?:blocks\.)?\d+)*)\.)")

Groups = list[dict[str, Any]]  # as torch's optimizers take them
Parameters = dict[str, nn.Parameter]  # by name


def build_optimizer(cfg: OptimConfig, model: nn.Module, new: Sequence[str] = ()) -> Optimizer:
    """Builds the optimizer, with parameters grouped by learning rate and weight decay.

    Parameters with `lr_scale: 0` in the setting `optim.groups` get `requires_grad=False`.

    Args:
        cfg: the settings of the optimizer.
        model: the model whose parameters are trained.
        new: the names of the parameters that do not come from weights. These parameters and the
            last linear layer are the head.

    Raises:
        Refused: a pattern matches no parameter, or takes too long to match. All parameters are
            frozen. The optimizer does not take a keyword in `optim.args`. The user's own optimizer
            cannot be used, for example because `step` needs a closure.
    """
    too_slow = f"a pattern takes more than {MATCH_TIMEOUT} s to match; simplify it"
    with time_limit(MATCH_TIMEOUT, Refused(f"optim.groups or optim.freeze: {too_slow}")):
        groups = _group_parameters(cfg, model, new)
    known = OPTIMIZERS.get(cfg.name)
    kind = _without_compiler(known) if known else import_object(cfg.name, "optim.name")
    try:
        options = _keyword_arguments(cfg, kind, groups)
        optimizer = kind(groups, lr=cfg.lr, **options)
    except Refused:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        key = "optim.args" if cfg.args else "optim.name"
        raise Refused(f"{key}: {cfg.name}: {error}") from None
    _check_optimizer(cfg, optimizer)
    # On a resume, these keys of the groups keep their configured values; the checkpoint restores
    # the others.
    optimizer.configured = None if known else {*PER_GROUP, *options, "initial_lr", FREEZE}
    return optimizer


def _keyword_arguments(cfg: OptimConfig, kind: Callable, groups: Groups) -> dict[str, Any]:
    """Returns the keyword arguments of the optimizer, without lr and weight_decay.

    The result contains the settings that the optimizer takes, and all entries of `optim.args`. For
    a torch optimizer with a fused implementation, the key "fused" is added. The key is not added if
    `optim.args` contains "fused" or "foreach".

    Args:
        cfg: the settings of the optimizer.
        kind: the class of the optimizer, or a function that returns an optimizer.
        groups: the parameter groups. Each group is a dict with the parameters under "params".

    Raises:
        Refused: `optim.args` contains a keyword that has a setting of its own.
    """
    names = inspect.signature(kind).parameters.keys()
    settings = ({field.name for field in fields(cfg)} - NO_KEYWORDS) & names
    twice = sorted(cfg.args.keys() & (settings | PER_GROUP))
    if twice:
        raise Refused(f"optim.args: {twice[0]} has a setting of its own: optim.{twice[0]}")
    options = {name: getattr(cfg, name) for name in sorted(settings - PER_GROUP)} | cfg.args
    if cfg.name in OPTIMIZERS and "fused" in names and "foreach" not in options:
        # A fused optimizer updates all parameters in one pass, but it cannot update complex ones.
        parameters = [parameter for group in groups for parameter in group["params"]]
        options.setdefault("fused", all(p.is_floating_point() for p in parameters))
    return options


def _check_optimizer(cfg: OptimConfig, optimizer: Any) -> None:
    """Raises Refused if training cannot use an optimizer.

    A warning is logged if `optim.weight_decay` is set but the optimizer has no weight decay.

    Args:
        cfg: the settings of the optimizer.
        optimizer: the object to check. The object has to be a torch Optimizer with a `step` that
            needs no closure.
    """
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise Refused(f"optim.name: {cfg.name}: expected an Optimizer, got {kind}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise Refused(f"optim.name: {cfg.name}: needs a closure; a step here takes one gradient")
    if cfg.weight_decay and "weight_decay" not in optimizer.defaults:
        logger.warning("optim.weight_decay: %s takes none, so that none is applied", cfg.name)


def _group_parameters(cfg: OptimConfig, model: nn.Module, new: Sequence[str]) -> Groups:
    """Returns the parameter groups for a torch optimizer.

    All parameters of a group have the same learning rate and the same weight decay. Parameters with
    fewer than two dimensions, such as biases, get no weight decay. Parameters with `lr_scale: 0` in
    `optim.groups` are in no group and get `requires_grad=False`.

    Parameters that match `optim.freeze` are in separate groups. Each of the separate groups has the
    key "freeze_epochs", the number of epochs without training.

    Args:
        cfg: the settings of the optimizer.
        model: the model whose parameters are grouped.
        new: the names of the parameters that do not come from weights.

    Raises:
        Refused: a pattern matches no parameter, or all parameters are frozen.
    """
    parameters, head = dict(model.named_parameters()), {*new, *last_linear(model)}
    lr_scales = _choose_scales(cfg, parameters, head)
    for name, parameter in parameters.items():
        if lr_scales[name] == 0:
            parameter.requires_grad_(False)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise Refused("optim.groups: every parameter is frozen; leave something to train")
    frozen_first = _match_frozen_first(cfg, parameters, trained, head)
    frozen = frozen_first if cfg.freeze_epochs else []
    slow = [name for name in new if lr_scales[name] < 1 or name in frozen]
    if slow:
        which = "parameters without weights train slowly, or are frozen at first"
        logger.warning("optim: %s: %s; part: backbone leaves them out", which, list_some(slow))
    decays = _layer_decays(parameters, head, cfg.layer_decay)
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        scale = lr_scales[name] * decays.get(name, 1.0)
        key = (scale, parameter.ndim > 1, name in frozen_first)
        if key not in groups:
            weight_decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
            group = {"params": [], "lr": cfg.lr * scale, "weight_decay": weight_decay}
            groups[key] = group | ({FREEZE: cfg.freeze_epochs} if name in frozen_first else {})
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _choose_scales(
    cfg: OptimConfig, parameters: Parameters, head: Collection[str]
) -> dict[str, float]:
    """Returns the factor on the learning rate of each parameter that `optim.groups` gives.

    Raises:
        Refused: a pattern matches no parameter.
    """
    scales = dict.fromkeys(parameters, 1.0)
    for index, group in enumerate(cfg.groups):
        key, pattern = f"optim.groups[{index}]", group.part or group.match
        names = _match(f"{key}.{'part' if group.part else 'match'}", pattern, parameters, head)
        if len(names) == len(parameters):
            logger.warning("%s: %s is every parameter; optim.lr says the same", key, pattern)
        scales |= dict.fromkeys(names, group.lr_scale)
    return scales


def _layer_decays(parameters: Parameters, head: Collection[str], decay: float) -> dict[str, float]:
    """Returns the factor on the learning rate of each parameter outside of the head by its layer.

    The layer before the head has the factor `decay`, the one before `decay` squared, and so on, as
    in BEiT (Bao et al., 2022). A layer is a numbered block of the network. Parameters without a
    number, and blocks without matrices, such as norms, belong to the layer before.

    Raises:
        Refused: `decay` is not 1, and the names have no numbered blocks.
    """
    blocks: dict[str, list[str]] = {}
    block = ""
    for name in (name for name in parameters if name not in head):
        found = BLOCK.match(name)
        block = found[1] or found[2] if found else block
        blocks.setdefault(block, []).append(name)
    layers: list[list[str]] = []
    for names in blocks.values():
        if not layers or any(parameters[name].ndim > 1 for name in names):
            layers.append([])
        layers[-1] += names
    if decay < 1 and len(layers) < 2:
        some = list_some(list(parameters))
        raise Refused(f"optim.layer_decay: expected numbered blocks such as layer1.0, got {some}")
    numbers = range(len(layers), 0, -1)
    return {name: decay**number for number, names in zip(numbers, layers) for name in names}


def _match_frozen_first(
    cfg: OptimConfig, parameters: Parameters, trained: Parameters, head: Collection[str]
) -> Collection[str]:
    """Returns the names of the parameters that match `optim.freeze`.

    The matching parameters are frozen during the first `optim.freeze_epochs` epochs. Without
    `optim.freeze`, they are those of the backbone.

    Args:
        cfg: the settings of the optimizer.
        parameters: all parameters of the model.
        trained: the trainable parameters.
        head: the names of the parameters of the head.

    Raises:
        Refused: `optim.freeze` matches no parameter. Or `optim.freeze_epochs` is above 0, and
            `optim.freeze` matches all trainable parameters.
    """
    if cfg.freeze is None and not cfg.freeze_epochs:
        return []
    matching = _match("optim.freeze", cfg.freeze or "backbone", parameters, head)
    if not cfg.freeze_epochs:
        logger.warning("optim.freeze: no effect, since optim.freeze_epochs is 0")
    elif trained.keys() <= set(matching):
        raise Refused("optim.freeze: matches every parameter; leave something to train")
    return matching


def _match(key: str, pattern: str, names: Collection[str], head: Collection[str]) -> list[str]:
    """Returns the names of a part of the model, or those in which a regular expression is found.

    Args:
        key: the setting that contains the pattern, such as "optim.groups[0].match". The error
            message begins with the key.
        pattern: "head", "backbone", "body", or the regular expression.
        names: the names of parameters, such as "fc.weight".
        head: the names of the parameters of the head.

    Raises:
        Refused: there are no such names.
    """
    if pattern in PARTS:
        matching = [name for name in names if (name in head) == (pattern == "head")]
    else:
        matching = [name for name in names if re.search(pattern, name)]
    if not matching:
        some, advice = ", ".join(list(names)[-4:]), "a part is head or backbone"
        reason = f"no parameter's name matches {pattern!r}; names are such as {some}; {advice}"
        raise Refused(f"{key}: {reason}")
    return matching


def freeze(optimizer: Optimizer, epoch: int) -> None:
    """Freezes or unfreezes parameters of an optimizer for the current epoch.

    Only parameter groups with the key "freeze_epochs" change. The parameters of such a group are
    frozen while `epoch` is below the value of the key.

    Args:
        optimizer: an optimizer that `build_optimizer` returned.
        epoch: the number of completed epochs.
    """
    for group in optimizer.param_groups:
        if FREEZE in group:  # torch's optimizers skip parameters without a gradient
            for parameter in group["params"]:
                parameter.requires_grad_(epoch >= group[FREEZE])


@functools.cache
def _without_compiler(kind: type[Optimizer]) -> type[Optimizer]:
    """Returns a subclass of a torch optimizer that does not import torch._dynamo.

    In torch, the methods of an optimizer are wrapped for torch.compile. The first call of a wrapper
    imports torch._dynamo (see torch/_compile.py). The methods of the subclass have no wrappers. Up
    to the first step of SGD, 4.1, 4.5 and 2.4 s were measured with the wrappers. Without the
    wrappers, 0.01 s were measured.

    Args:
        kind: the class of the optimizer, such as torch.optim.SGD.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    take_step = inspect.unwrap(kind.step)

    def step(self, closure=None):
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return take_step(self, closure)

    return type(kind.__name__, (kind,), methods | {"step": step})
