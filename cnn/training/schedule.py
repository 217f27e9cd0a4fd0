"""The learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from cnn.config import ScheduleConfig

# The state of ReduceLROnPlateau; its other attributes are settings, which a resume may change.
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")

ONECYCLE_RISE = 0.3  # fraction of the steps in which lr rises (as in torch's OneCycleLR)
ONECYCLE_FIRST = 1 / 25
ONECYCLE_LAST = 1e-4 / 25


class Schedule:
    """A schedule that sets the learning rate of every step.

    The learning rate is a function of the index of the step, computed with torch's LambdaLR. The
    schedule `plateau` is an exception: after the warm-up, torch's ReduceLROnPlateau lowers the
    learning rate when the monitored metric stops improving.

    Args:
        cfg: the settings of the schedule.
        optimizer: the optimizer, whose learning rates are changed in place.
        steps_per_epoch: the number of optimizer steps per epoch.
        epochs: the number of epochs of the whole run.
        mode: the direction in which the monitored metric improves: "min" if lower values are
            better, "max" if higher ones are.
    """

    def __init__(
        self,
        cfg: ScheduleConfig,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        epochs: int,
        mode: str,
    ):
        # The schedule onecycle contains a warm-up.
        warmup_epochs = 0 if cfg.name == "onecycle" else cfg.warmup_epochs
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
        """Sets the learning rate of the next step. Has to be called after every optimizer step."""
        if self.plateau is None or self.by_step.last_epoch < self.warmup_steps:
            self.by_step.step()

    def end_epoch(self, metric: float) -> None:
        """Lowers the learning rate if the schedule is `plateau` and the metric stopped improving.

        Has to be called after every validation. With other schedules, and during the warm-up,
        nothing is done.

        Args:
            metric: the value of the monitored metric in this validation.
        """
        if self.plateau is not None and self.by_step.last_epoch >= self.warmup_steps:
            self.plateau.step(metric)

    def state_dict(self) -> dict:
        """Returns the state for a checkpoint, as a dict of plain values.

        It contains the index of the step and, with `plateau`, the state of ReduceLROnPlateau.
        """
        state = {"by_step": {"last_epoch": self.by_step.last_epoch}}
        if self.plateau is not None:
            state["plateau"] = {name: getattr(self.plateau, name) for name in PLATEAU_STATE}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restores a state that `state_dict` returned, and sets the learning rate of the next step.

        With the schedule `plateau` after the warm-up, the learning rate is not set, because it is
        part of the optimizer's state dict.
        """
        self.by_step.last_epoch = step = state["by_step"]["last_epoch"]
        if self.plateau is None or step < self.warmup_steps:
            # Computed again, since a changed train.epochs changes the learning rate at this step.
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._factor(step)
        if self.plateau is not None and "plateau" in state:
            for name in PLATEAU_STATE:
                setattr(self.plateau, name, state["plateau"][name])

    def _factor(self, step: int) -> float:
        """Returns the factor at a step: the learning rate divided by the initial learning rate.

        All parameter groups have the same factor.

        Args:
            step: the index of the optimizer step, from 0.
        """
        cfg, warmup = self.cfg, self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        return SCHEDULES[cfg.name](cfg, step // self.steps_per_epoch, progress, self.highest_lr)


def _anneal(start: float, end: float, progress: float) -> float:
    """Returns a value that moves from `start` to `end` along half a period of a cosine.

    Args:
        start: the value at progress 0.
        end: the value at progress 1.
        progress: a fraction from 0 to 1.
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    if progress < ONECYCLE_RISE:
        return _anneal(ONECYCLE_FIRST, 1.0, progress / ONECYCLE_RISE)
    return _anneal(1.0, ONECYCLE_LAST, (progress - ONECYCLE_RISE) / (1 - ONECYCLE_RISE))


# The factor on the learning rate after the warm-up: a function of the settings, the epoch, the
# fraction of the steps done, and the highest learning rate of all groups. Cosine follows
# Loshchilov and Hutter (2017) without restarts, onecycle follows Smith and Topin (2018).
SCHEDULES: dict[str, Callable[[ScheduleConfig, int, float, float], float]] = {
    "constant": lambda *_: 1.0,
    "step": lambda cfg, epoch, *_: cfg.gamma ** (epoch // cfg.step_epochs),
    "multistep": lambda cfg, epoch, *_: cfg.gamma ** sum(epoch >= m for m in cfg.milestones),
    "cosine": lambda cfg, _, done, highest: _anneal(1.0, min(cfg.min_lr / highest, 1.0), done),
    "onecycle": lambda _cfg, _epoch, done, _highest: _onecycle(done),
    "plateau": lambda *_: 1.0,  # ReduceLROnPlateau does the rest
}
