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
    """A schedule that sets the learning rate of every optimizer step.

    In most schedules, the learning rate depends only on the index of the step. The schedule
    `plateau` lowers the learning rate when the monitored metric stops improving.

    Args:
        cfg: the settings of the schedule.
        optimizer: the optimizer whose learning rates are set.
        steps_per_epoch: the number of optimizer steps per epoch.
        epochs: the number of epochs of the whole run.
        mode: "min" if lower values of the monitored metric are better, "max" if higher values are
            better.

    Attributes:
        steps_per_epoch: the number of optimizer steps per epoch.
        steps: the number of optimizer steps of the whole run.
        warmup_steps: the number of optimizer steps in which the learning rate rises.
    """

    def __init__(
        self,
        cfg: ScheduleConfig,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        epochs: int,
        mode: str,
    ):
        self.warmup_steps = cfg.warmup_steps
        if cfg.warmup_steps is None:
            self.warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        if cfg.name == "onecycle":  # it contains a warm-up
            self.warmup_steps = 0
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
        """Sets the learning rate of the next optimizer step.

        This method has to be called after every optimizer step.
        """
        if self.plateau is None or self.by_step.last_epoch < self.warmup_steps:
            self.by_step.step()

    def end_epoch(self, metric: float) -> None:
        """Lowers the learning rate if the monitored metric has stopped improving.

        Only the schedule `plateau` does so, and only after the warm-up. This method has to be
        called after every validation.

        Args:
            metric: the value of the monitored metric in the latest validation.
        """
        if self.plateau is not None and self.by_step.last_epoch >= self.warmup_steps:
            self.plateau.step(metric)

    def state_dict(self) -> dict:
        """Returns the state for a checkpoint, as a dict of plain values.

        The entry "by_step" contains the index of the step. The schedule `plateau` has a further
        entry "plateau".
        """
        state = {"by_step": {"last_epoch": self.by_step.last_epoch}}
        if self.plateau is not None:
            state["plateau"] = {name: getattr(self.plateau, name) for name in PLATEAU_STATE}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restores a saved state, and sets the learning rate of the next step.

        After the warm-up, the schedule `plateau` does not set the learning rate. The learning rate
        is then restored with the optimizer.

        Args:
            state: a dict that `state_dict` returned.
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
        """Returns the learning rate at a step, divided by the initial learning rate.

        The result is the same for all parameter groups.

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
