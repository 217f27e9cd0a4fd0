"""The optimizer: which one, and which parameters it steps in which group."""

import functools
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnn.config import OptimConfig
from cnn.errors import Refused
from cnn.utils.importing import import_object
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
OF_GROUPS = ("lr", "weight_decay")  # keywords whose values differ from group to group
FREEZE = "freeze_epochs"  # in the optimizer's groups that are frozen at first
NO_KEYWORDS = ("name", "groups", "freeze", FREEZE, "args")  # settings that say something else
MATCHING = 10  # seconds that patterns may take; some would take longer than any run


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> Optimizer:
    """Builds the optimizer over the model's parameters, grouped by learning rate and weight decay.

    Raises:
        Refused: a pattern that matches nothing, everything frozen, unknown `optim.args`, an
            optimizer that a training step cannot use.
    """
    slow = (
        f"takes more than {MATCHING} s to be held against the parameters' names; say it otherwise"
    )
    with time_limit(MATCHING, Refused(f"optim.groups: a pattern of it, or optim.freeze, {slow}")):
        groups = _group_parameters(cfg, model)
    known = OPTIMIZERS.get(cfg.name)
    make = _without_compiler(known) if known else import_object(cfg.name, "optim.name")
    try:
        fused = all(p.is_floating_point() for _, part in groups for p in part)
        options = _keywords(cfg, make, fused)
        made = make([{"params": p, **group} for group, p in groups], lr=cfg.lr, **options)
    except Refused:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        key = "optim.args" if cfg.args else "optim.name"
        raise Refused(f"{key}: {cfg.name}: {error}") from None
    if not isinstance(made, Optimizer):
        raise Refused(f"optim.name: {cfg.name}: expected an Optimizer, got {type(made).__name__}")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise Refused(f"optim.name: {cfg.name}: needs a closure; a step here takes one gradient")
    if cfg.weight_decay and "weight_decay" not in made.defaults:
        logger.warning("optim.weight_decay: %s takes none, so that none is applied", cfg.name)
    # What a resume sets as configured; the rest of a group is the optimizer's own, to be restored.
    made.configured = None if known else {*OF_GROUPS, *options, "initial_lr", FREEZE}
    return made


def _keywords(cfg: OptimConfig, make: Callable[..., Optimizer], fused: bool) -> dict[str, Any]:
    """What the optimizer is given beside parameters and lr: settings that its signature has, and args.

    Args:
        fused: whether the parameters can be stepped in one pass; complex ones cannot.
    """
    signature = inspect.signature(make).parameters
    own = ({field.name for field in fields(cfg)} - {*NO_KEYWORDS}) & signature.keys()
    doubled = sorted(cfg.args.keys() & (own | {*OF_GROUPS}))
    if doubled:
        raise Refused(f"optim.args: {doubled[0]} has a setting of its own: optim.{doubled[0]}")
    options = {name: getattr(cfg, name) for name in sorted(own - {*OF_GROUPS})} | cfg.args
    if cfg.name in OPTIMIZERS and "fused" in signature and "foreach" not in options:
        options.setdefault("fused", fused)  # all parameters in one pass, on CPU and CUDA
    return options


def _group_parameters(
    cfg: OptimConfig, model: nn.Module
) -> list[tuple[dict[str, float], list[nn.Parameter]]]:
    """The settings of each group, and its parameters.

    Biases and the parameters of norms (one dimension or none) have no weight decay. A group with
    `lr_scale: 0` is frozen. What `optim.freeze` matches is in groups of its own, which know for how
    many epochs: within a group all parameters have taken the same steps.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        scale = 1.0
        for number, group in enumerate(cfg.groups):
            if re.search(group.match, name):
                scale = group.lr_scale
                used.add(number)
        if scale == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            at_first = cfg.freeze is not None and re.search(cfg.freeze, name) is not None
            groups.setdefault((scale, parameter.ndim > 1, at_first), []).append(parameter)
    for number, group in enumerate(cfg.groups):
        if number not in used:
            raise _no_match(f"optim.groups[{number}].match", group.match, model)
    if not groups:
        raise Refused("optim.groups: every parameter is frozen; leave something to train")
    _check_frozen_at_first(cfg, [at_first for _, _, at_first in groups], model)
    return [
        (
            {"lr": cfg.lr * scale, "weight_decay": cfg.weight_decay if decayed else 0.0}
            | ({FREEZE: cfg.freeze_epochs} if at_first else {}),
            parameters,
        )
        for (scale, decayed, at_first), parameters in groups.items()
    ]


def _check_frozen_at_first(cfg: OptimConfig, frozen: list[bool], model: nn.Module) -> None:
    """Refuses to freeze nothing, or all of it, for some epochs."""
    if not cfg.freeze_epochs:
        return
    if cfg.freeze is None:
        raise Refused(
            "optim.freeze_epochs: needs optim.freeze, which says what: a regular expression such as"
            " '^(?!fc)'"
        )
    if not any(frozen):
        raise _no_match("optim.freeze", cfg.freeze, model)
    if all(frozen):
        raise Refused("optim.freeze: matches every parameter; leave something to train")


def _no_match(key: str, pattern: str, model: nn.Module) -> Refused:
    names = ", ".join([name for name, _ in model.named_parameters()][-4:])
    return Refused(f"{key}: no parameter's name matches {pattern!r}; names are such as {names}")


def freeze(optimizer: Optimizer, epoch: int) -> None:
    """Freezes what is to stay as it is after so many epochs, and frees it when these are over.

    A function of the epoch, so that a resume has nothing to restore. Parameters without a gradient
    are passed over by the optimizer, which remembers nothing of them until they have one.
    """
    for group in optimizer.param_groups:
        if FREEZE in group:
            for parameter in group["params"]:
                parameter.requires_grad_(epoch >= group[FREEZE])


@functools.cache
def _without_compiler(kind: type[Optimizer]) -> type[Optimizer]:
    """The same optimizer without what torch.compile asks of it; only models are compiled here.

    torch's wrappers around these methods (torch/_compile.py, torch/optim/optimizer.py) import
    torch._dynamo at the first call, as long as torch itself takes; beneath them is the mathematics.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    take_step = inspect.unwrap(kind.step)

    def step(self, closure=None):
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return take_step(self, closure)

    return type(kind.__name__, (kind,), methods | {"step": step})
