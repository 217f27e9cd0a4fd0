"""The learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cnn.config import ScheduleConfig

# What ReduceLROnPlateau remembers; the rest of it are settings, which a resume may change.
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

ONECYCLE_RISE = 0.3  # share of the steps in which lr rises, from 1/25 (torch's OneCycleLR)
ONECYCLE_FIRST = 1 / 25
ONECYCLE_LAST = 1e-4 / 25


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
        progress = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        return SCHEDULES[cfg.name](cfg, step // self.steps_per_epoch, progress, self.highest_lr)


def _between(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _constant(cfg: ScheduleConfig, epoch: int, progress: float, highest: float) -> float:
    return 1.0


def _step(cfg: ScheduleConfig, epoch: int, progress: float, highest: float) -> float:
    return cfg.gamma ** (epoch // cfg.step_epochs)


def _multistep(cfg: ScheduleConfig, epoch: int, progress: float, highest: float) -> float:
    return cfg.gamma ** sum(epoch >= milestone for milestone in cfg.milestones)


def _cosine(cfg: ScheduleConfig, epoch: int, progress: float, highest: float) -> float:
    """Loshchilov and Hutter (2017), without restarts."""
    least = min(cfg.min_lr / highest, 1.0)
    return least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2


def _onecycle(cfg: ScheduleConfig, epoch: int, progress: float, highest: float) -> float:
    """Smith and Topin (2018)."""
    if progress < ONECYCLE_RISE:
        return _between(ONECYCLE_FIRST, 1.0, progress / ONECYCLE_RISE)
    return _between(1.0, ONECYCLE_LAST, (progress - ONECYCLE_RISE) / (1 - ONECYCLE_RISE))


# The factor on the learning rate after the warm-up, from epoch, share of the steps and highest lr.
SCHEDULES: dict[str, Callable[[ScheduleConfig, int, float, float], float]] = {
    "constant": _constant,
    "step": _step,
    "multistep": _multistep,
    "cosine": _cosine,
    "onecycle": _onecycle,
    "plateau": _constant,  # the rest is ReduceLROnPlateau's
}
