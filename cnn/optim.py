"""The optimizer with its parameter groups, and the learning rate as a function of the step."""

import functools
import inspect
import logging
import math
import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cnn.config import OptimConfig, Refused, ScheduleConfig

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
FUSED = ("sgd", "adam", "adamw", "adagrad")  # have a kernel for that, on CPU and CUDA
WITH_MOMENTUM = ("sgd", "rmsprop")
FREEZE = "freeze_epochs"  # in the optimizer's groups that are frozen at first

# What ReduceLROnPlateau remembers; the rest of it are settings, which a resume may change.
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

ONECYCLE_RISE = 0.3  # share of the steps in which lr rises, from 1/25 (torch's OneCycleLR)
ONECYCLE_FIRST = 1 / 25
ONECYCLE_LAST = 1e-4 / 25


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Groups the parameters by learning rate and weight decay, and builds the optimizer.

    Biases and the parameters of norms (one dimension or none) have no weight decay. A group with
    `lr_scale: 0` is frozen. What `optim.freeze` matches is in groups of its own, which know for how
    many epochs: within a group all parameters have taken the same steps.

    Raises:
        Refused: a pattern that matches nothing, everything frozen, unknown `optim.args`.
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
    if cfg.freeze_epochs and cfg.freeze is None:
        raise Refused(
            "optim.freeze_epochs: needs optim.freeze, which says what: a regular expression such as"
            " '^(?!fc)'"
        )
    if cfg.freeze_epochs and not any(at_first for _, _, at_first in groups):
        raise _no_match("optim.freeze", cfg.freeze, model)
    if cfg.freeze_epochs and all(at_first for _, _, at_first in groups):
        raise Refused("optim.freeze: matches every parameter; leave something to train")
    doubled = sorted({"lr", "weight_decay", "momentum"} & set(cfg.args))
    if doubled:
        raise Refused(f"optim.args: {doubled[0]} has a setting of its own: optim.{doubled[0]}")
    options = dict(cfg.args)
    if cfg.name in FUSED and "foreach" not in options:
        options.setdefault("fused", True)  # all parameters in one pass
    if cfg.name in WITH_MOMENTUM:
        options["momentum"] = cfg.momentum
    try:
        return _without_compiler(OPTIMIZERS[cfg.name])(
            [
                {
                    "params": parameters,
                    "lr": cfg.lr * scale,
                    "weight_decay": cfg.weight_decay if decayed else 0.0,
                    **({FREEZE: cfg.freeze_epochs} if at_first else {}),
                }
                for (scale, decayed, at_first), parameters in groups.items()
            ],
            lr=cfg.lr,
            **options,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refused(f"optim.args: {cfg.name}: {error}") from None


def _no_match(key: str, pattern: str, model: nn.Module) -> Refused:
    names = ", ".join([name for name, _ in model.named_parameters()][-4:])
    return Refused(f"{key}: no parameter's name matches {pattern!r}; names are such as {names}")


def freeze(optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Freezes what is to stay as it is after so many epochs, and frees it when these are over.

    A function of the epoch, so that a resume has nothing to restore. Parameters without a gradient
    are passed over by the optimizer, which remembers nothing of them until they have one.
    """
    for group in optimizer.param_groups:
        if FREEZE in group:
            for parameter in group["params"]:
                parameter.requires_grad_(epoch >= group[FREEZE])


@functools.cache
def _without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
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


class Schedule:
    """The learning rate of every step; torch's schedulers underneath.

    All but `plateau` are functions of the step alone (LambdaLR), so that there is nothing to
    remember but the step. `plateau` warms up in the same way and then watches the monitored
    metric at every epoch's end (ReduceLROnPlateau).
    """

    def __init__(
        self,
        cfg: ScheduleConfig,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        epochs: int,
        mode: str,
    ):
        warmup_epochs = 0 if cfg.name == "onecycle" else cfg.warmup_epochs  # it rises by itself
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.cfg, self.optimizer = cfg, optimizer
        self.steps_per_epoch, self.steps = steps_per_epoch, epochs * steps_per_epoch
        self.highest_lr = max(group["lr"] for group in optimizer.param_groups)
        self.by_step = LambdaLR(optimizer, self._factor)
        self.plateau = None
        if cfg.name == "plateau":
            self.plateau = ReduceLROnPlateau(
                optimizer, mode, factor=cfg.gamma, patience=cfg.patience, min_lr=cfg.min_lr
            )

    def step(self) -> None:
        """After every optimizer step."""
        if self.plateau is None or self.by_step.last_epoch < self.warmup_steps:
            self.by_step.step()

    def end_epoch(self, metric: float) -> None:
        """After every validation, with the monitored metric."""
        if self.plateau is not None and self.by_step.last_epoch >= self.warmup_steps:
            self.plateau.step(metric)

    def state_dict(self) -> dict:
        state = {"by_step": {"last_epoch": self.by_step.last_epoch}}
        if self.plateau is not None:
            state["plateau"] = {name: getattr(self.plateau, name) for name in PLATEAU_STATE}
        return state

    def load_state_dict(self, state: dict) -> None:
        self.by_step.last_epoch = step = state["by_step"]["last_epoch"]
        if self.plateau is None or step < self.warmup_steps:
            # Anew, not as it was saved: train.epochs may have changed, and with it the curve.
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._factor(step)
        if self.plateau is not None and "plateau" in state:
            for name in PLATEAU_STATE:
                setattr(self.plateau, name, state["plateau"][name])

    def _factor(self, step: int) -> float:
        """The factor on every group's learning rate for the step that comes after `step` others."""
        cfg, warmup = self.cfg, self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        epoch = step // self.steps_per_epoch
        progress = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        if cfg.name == "step":
            return cfg.gamma ** (epoch // cfg.step_epochs)
        if cfg.name == "multistep":
            return cfg.gamma ** sum(epoch >= milestone for milestone in cfg.milestones)
        if cfg.name == "cosine":  # Loshchilov and Hutter (2017), without restarts
            least = min(cfg.min_lr / self.highest_lr, 1.0)
            return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2
        if cfg.name == "onecycle":  # Smith and Topin (2018)
            if progress < ONECYCLE_RISE:
                return _between(ONECYCLE_FIRST, 1.0, progress / ONECYCLE_RISE)
            return _between(1.0, ONECYCLE_LAST, (progress - ONECYCLE_RISE) / (1 - ONECYCLE_RISE))
        return 1.0


def _between(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
