"""All that changes during a run, in one object, with its save and its load side by side."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnn.metrics.running import RunningMetrics
from cnn.metrics.scores import Metrics, improves
from cnn.training.distributed import ALONE, Group
from cnn.training.schedule import Schedule
from cnn.utils.checkpoint import clone_tree
from cnn.utils.module_state import load_state

# Attributes that are plain values, in a checkpoint under their own names.
AS_THEY_ARE = ("epoch", "step", "lr", "group_lrs", "best", "history", "test", "predictions")
TIME_COLUMNS = ("images_per_second", "seconds")  # the last ones of history; differ between runs


class TrainingState:
    """Where a run stands.

    Attributes:
        epoch: epochs completed.
        step: optimizer steps taken.
        batch: batches done of the unfinished epoch; all of them means: to be validated.
        running_metrics: what the unfinished epoch's train metrics are made of.
        seconds: spent on the unfinished epoch.
        lr: of the latest step.
        best: {"metric", "value", "epoch"} of the best epoch, or None.
        epochs_since_best: epochs since the best one.
        group_lrs: where groups have learning rates of their own, theirs: {"lr_x0.1": ...}.
        loss: the user's own loss function, if it is a module: it may have state.
        group: the processes that train together.
        history: a row for each completed epoch.
        test: the final test's metrics, or None before it.
        predictions: of "val" (the best epoch) and "test", what was said of each image and how sure.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        *,
        ema_decay: float | None = None,
        compile: bool = False,
        loss: nn.Module | None = None,
        group: Group = ALONE,
    ):
        self.loss, self.group = loss, group
        self.model, self.optimizer, self.schedule, self.scaler = model, optimizer, schedule, scaler
        self.device = device
        self.ema = None
        if ema_decay is not None:
            average = get_ema_multi_avg_fn(ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.forward = group.wrap(torch.compile(model) if compile else model)
        self.epoch = self.step = self.batch = 0
        self.running_metrics = RunningMetrics(device)
        self.seconds = 0.0
        self.lr = 0.0
        self.group_lrs: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.epochs_since_best = 0
        self.history: list[Metrics] = []
        self.test: Metrics | None = None
        self.predictions: dict[str, dict[str, torch.Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.schedule.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "loss_state_dict": self.loss.state_dict() if self.loss is not None else {},
            "ema_state_dict": self.ema.module.state_dict() if self.ema is not None else None,
            "unfinished_epoch": {
                "batch": self.batch,
                "sums": self.running_metrics.state_dict(),
                "seconds": self.seconds,
            },
            "early_stop": {"waited": self.epochs_since_best},
            **{name: copy.copy(getattr(self, name)) for name in AS_THEY_ARE},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._check_fit(saved)
        load_state(self.model, saved["model_state_dict"])
        self._load_optimizer(saved["optimizer_state_dict"])
        self.schedule.load_state_dict(saved["scheduler_state_dict"])
        if saved["scaler_state_dict"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler_state_dict"])
        if self.loss is not None:
            self.loss.load_state_dict(saved.get("loss_state_dict", {}))  # not in files of before
        if self.ema is not None:
            load_state(self.ema.module, saved["ema_state_dict"] or saved["model_state_dict"])
            self.ema.n_averaged.fill_(saved["step"])
        self.batch = saved["unfinished_epoch"]["batch"]
        self.running_metrics.load_state_dict(saved["unfinished_epoch"]["sums"])
        self.seconds = saved["unfinished_epoch"]["seconds"]
        self.epochs_since_best = saved["early_stop"]["waited"]
        for name in AS_THEY_ARE:
            if name in saved:  # some are not in files of before
                setattr(self, name, copy.copy(saved[name]))

    def _check_fit(self, saved: dict[str, Any]) -> None:
        """Raises ValueError where tensors have another shape or dtype; torch would convert some."""
        weights = self.model.state_dict()
        missing = sorted(weights.keys() - saved["model_state_dict"].keys())
        if missing:  # torch passes over some, such as BatchNorm's count of batches
            raise ValueError(f"model_state_dict.{missing[0]}: missing")
        for part in ("model_state_dict", "ema_state_dict"):
            for name, tensor in (saved[part] or {}).items():
                if isinstance(weights.get(name), torch.Tensor):  # else what a module keeps beside
                    check_like(tensor, weights[name], f"{part}.{name}")
        parameters, remembered = self._parameters(), saved["optimizer_state_dict"]
        numbers = [n for group in remembered["param_groups"] for n in group["params"]]
        if numbers != list(range(len(parameters))):
            raise ValueError(
                f"optimizer_state_dict: expected {len(parameters)} parameters in order"
            )
        if self._configured() is not None:
            return  # an optimizer of the user's own may remember whatever it likes
        expected = remembered_of_one(self.optimizer)
        for number, memory in remembered["state"].items():
            if number not in numbers:
                raise ValueError(f"optimizer_state_dict.state.{number}: no such parameter")
            for name, like in expected.items():
                key = f"optimizer_state_dict.state.{number}.{name}"
                check_like(memory.get(name), parameters[number] if like.ndim else like, key)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Loads what the optimizer remembers, but keeps the settings that it was built with.

        They equal the saved ones unless the user changed them for this resume. The learning rate
        is the schedule's to say; plateau's, which it has lowered, keeps its ratio to the first.
        """
        built = [dict(group) for group in self.optimizer.param_groups]
        configured, parameters = self._configured(), self._parameters()
        state = clone_tree(saved["state"])
        if configured is None:
            state = {n: laid_out(part, parameters[n]) for n, part in state.items()}
        self.optimizer.load_state_dict(saved | {"state": state})
        if configured is not None:  # torch has cast all to the parameters' dtype, but for `step`
            for number in [number for number in state if type(number) is int]:
                held, memory = self.optimizer.state[parameters[number]], state[number]
                for name, value in memory.items() if isinstance(memory, dict) else ():
                    if getattr(held.get(name), "dtype", None) != getattr(value, "dtype", "none"):
                        held[name] = clone_tree(value, parameters[number].device)
        for group, settings in zip(self.optimizer.param_groups, built):
            lr = group["lr"] * (settings["initial_lr"] / group["initial_lr"])
            kept = settings.keys() - {"params"}
            if configured is not None:
                kept &= configured
            else:  # a key more would go from file to file
                for key in group.keys() - settings.keys():
                    del group[key]
            group |= {key: settings[key] for key in kept}
            group["lr"] = lr

    def _parameters(self) -> list[nn.Parameter]:
        """In the order in which the optimizer numbers them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _configured(self) -> set[str] | None:
        """What of the optimizer's groups the settings say; None: all of it."""
        return getattr(self.optimizer, "configured", None)

    def evaluated_model(self) -> nn.Module:
        """The weights that are validated and kept: the averaged ones where there are some."""
        return self.ema.module if self.ema is not None else self.model

    def end_step(self, num_batches: int) -> None:
        """Counts an optimizer step over so many batches and moves the learning rate on."""
        self.lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.group_lrs = own_lrs(self.optimizer)
        self.schedule.step()
        self.step += 1
        self.batch += num_batches

    def end_epoch(
        self,
        metrics: Metrics,
        monitor: str,
        val_seconds: float,
        predictions: dict[str, torch.Tensor] | None = None,
    ) -> bool:
        """Completes the epoch with its validation; returns whether it is the best so far.

        Args:
            metrics: of the validation, each beginning with val_; None for what is undefined.
            val_seconds: that the validation took.
            predictions: of the validation, as `Outcome` gives them; kept of the best epoch.
        """
        train = {f"train_{name}": value for name, value in self.running_metrics.compute().items()}
        value = metrics[monitor]
        times = (
            int(self.running_metrics.count) / max(self.seconds, 1e-9),
            self.seconds + val_seconds,
        )
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self.lr}
        row |= self.group_lrs | train | metrics
        self.history.append(row | dict(zip(TIME_COLUMNS, times)))
        self.epoch += 1
        if value is not None:
            self.schedule.end_epoch(value)
        self.batch, self.seconds, self.running_metrics = 0, 0.0, RunningMetrics(self.device)
        improved = improves(monitor, value, self.best and self.best["value"])
        if improved:
            self.best = {"metric": monitor, "value": value, "epoch": self.epoch}
            self.predictions = {} if predictions is None else {"val": predictions}
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        return improved

    def is_finished(self, epochs: int, patience: int | None) -> bool:
        """Whether there is nothing left to train."""
        return self.batch == 0 and (
            self.epoch >= epochs or (patience is not None and self.epochs_since_best >= patience)
        )


def remembered_of_one(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of a parameter (1), learnt from a step of a copy; by name.

    What has its shape is as large as the parameter, the rest are single numbers ().
    """
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    group = {"params": [parameter], "capturable": False}  # which is for CUDA alone
    trial.param_groups = [optimizer.param_groups[0] | group]
    trial.step()
    return dict(trial.state[parameter])


def laid_out(tree: Any, parameter: nn.Parameter) -> Any:
    """A copy of what an optimizer remembers of a parameter, in memory laid out as the parameter is.

    Fused optimizers take it for granted; a file may say otherwise.
    """
    if isinstance(tree, dict):
        return {name: laid_out(value, parameter) for name, value in tree.items()}
    if isinstance(tree, torch.Tensor) and tree.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tree.dtype, device=tree.device).copy_(tree)
    if isinstance(tree, torch.Tensor):
        return tree.clone(memory_format=torch.contiguous_format)
    return tree


def check_like(tensor: Any, expected: torch.Tensor, name: str) -> None:
    """Raises ValueError where a tensor has another shape or dtype; torch would convert some."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")  # noqa: TRY004
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
        kinds = [
            f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (expected, tensor)
        ]
        raise ValueError(f"{name}: expected {kinds[0]}, got {kinds[1]}")


def own_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates of groups that have one of their own, by its ratio to the highest."""
    highest = max(group["initial_lr"] for group in optimizer.param_groups)
    return {
        f"lr_x{group['initial_lr'] / highest:g}": group["lr"]
        for group in optimizer.param_groups
        if group["initial_lr"] != highest
    }
