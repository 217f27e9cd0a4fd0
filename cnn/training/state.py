"""Everything that changes during a run, in one object, with its save and its load side by side."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnn.metrics.running import RunningMetrics
from cnn.metrics.scores import Metrics, improves
from cnn.training.schedule import Schedule
from cnn.utils.checkpoint import clone_tree
from cnn.utils.module_state import load_state

# Attributes that are plain values and stand in a checkpoint under their own names.
PLAIN_ATTRIBUTES = ("epoch", "step", "lr", "group_lrs", "best", "history", "test", "predictions")
TIME_COLUMNS = ("images_per_second", "seconds")  # the last ones of history; differ between runs


class TrainingState:
    """The state of a run between two optimizer steps.

    Attributes:
        epoch: number of completed epochs.
        step: number of optimizer steps taken.
        batch: number of batches done of the current epoch; after the last one, validation is due.
        running_metrics: of the training batches of the current epoch.
        seconds: spent on the current epoch.
        lr: learning rate of the latest step.
        group_lrs: those of parameter groups with their own learning rate: {"lr_x0.1": ...}.
        best: {"metric", "value", "epoch"} of the best epoch, or None.
        epochs_since_best: number of epochs since the best one.
        loss: a loss function of the user's own, which may have a state; else None.
        history: a row of metrics per completed epoch.
        test: metrics of the final test, or None before it.
        predictions: {"val": ..., "test": ...}: class and probability per image; those of the
            validation are of the best epoch.
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
        loss: nn.Module | None = None,
    ):
        self.model, self.optimizer, self.schedule, self.scaler = model, optimizer, schedule, scaler
        self.device, self.loss = device, loss
        self.ema = None
        if ema_decay is not None:
            average = get_ema_multi_avg_fn(ema_decay)
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
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
        """Returns the state as tensors and plain values."""
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
            **{name: copy.copy(getattr(self, name)) for name in PLAIN_ATTRIBUTES},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the state; older checkpoints lack some entries.

        Raises:
            ValueError: a tensor has another shape or dtype than the model or optimizer.
        """
        self._check_tensors(saved)
        load_state(self.model, saved["model_state_dict"])
        self._load_optimizer(saved["optimizer_state_dict"])
        self.schedule.load_state_dict(saved["scheduler_state_dict"])
        if saved["scaler_state_dict"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler_state_dict"])
        if self.loss is not None:
            self.loss.load_state_dict(saved.get("loss_state_dict", {}))
        if self.ema is not None:
            load_state(self.ema.module, saved["ema_state_dict"] or saved["model_state_dict"])
            self.ema.n_averaged.fill_(saved["step"])
        self.batch = saved["unfinished_epoch"]["batch"]
        self.running_metrics.load_state_dict(saved["unfinished_epoch"]["sums"])
        self.seconds = saved["unfinished_epoch"]["seconds"]
        self.epochs_since_best = saved["early_stop"]["waited"]
        for name in PLAIN_ATTRIBUTES:
            if name in saved:
                setattr(self, name, copy.copy(saved[name]))

    def _check_tensors(self, saved: dict[str, Any]) -> None:
        """Raises ValueError for tensors that torch would silently convert or ignore."""
        weights = self.model.state_dict()
        missing = sorted(weights.keys() - saved["model_state_dict"].keys())
        if missing:
            raise ValueError(f"model_state_dict.{missing[0]}: missing")
        for part in ("model_state_dict", "ema_state_dict"):
            for name, tensor in (saved[part] or {}).items():
                if isinstance(weights.get(name), torch.Tensor):  # else a module's extra state
                    check_like(tensor, weights[name], f"{part}.{name}")
        parameters, of_optimizer = self._parameters(), saved["optimizer_state_dict"]
        numbers = [n for group in of_optimizer["param_groups"] for n in group["params"]]
        if numbers != list(range(len(parameters))):
            raise ValueError(
                f"optimizer_state_dict: expected {len(parameters)} parameters in order"
            )
        if self._is_own_optimizer():
            return  # its state may hold anything
        expected = state_of_one_parameter(self.optimizer)
        for number, state in of_optimizer["state"].items():
            if not 0 <= number < len(parameters):
                raise ValueError(f"optimizer_state_dict.state.{number}: no such parameter")
            for name, like in expected.items():
                key = f"optimizer_state_dict.state.{number}.{name}"
                check_like(state.get(name), parameters[number] if like.ndim else like, key)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Loads the optimizer's state, but keeps the settings with which it was built.

        They equal the saved ones unless the user has changed them for this resume. Learning rates
        are set by the schedule; a plateau's keeps its ratio to the initial learning rate.
        """
        built = [dict(group) for group in self.optimizer.param_groups]
        is_own, parameters = self._is_own_optimizer(), self._parameters()
        state = clone_tree(saved["state"])
        if not is_own:
            state = {n: laid_out_like(part, parameters[n]) for n, part in state.items()}
        self.optimizer.load_state_dict(saved | {"state": state})
        if is_own:
            self._undo_casts(state)
        for group, settings in zip(self.optimizer.param_groups, built):
            lr = group["lr"] * (settings["initial_lr"] / group["initial_lr"])
            kept = settings.keys() - {"params"}
            if is_own:
                kept &= self.optimizer.configured
            else:  # a key too many would be passed on from checkpoint to checkpoint
                for key in group.keys() - settings.keys():
                    del group[key]
            group |= {key: settings[key] for key in kept}
            group["lr"] = lr

    def _undo_casts(self, saved: dict[Any, Any]) -> None:
        """Restores dtypes of the optimizer's state, which torch casts to the parameters' dtypes."""
        parameters = self._parameters()
        for number, state in saved.items():
            if type(number) is not int or not isinstance(state, dict):
                continue
            parameter = parameters[number]
            loaded = self.optimizer.state[parameter]
            for name, value in state.items():
                if getattr(loaded.get(name), "dtype", None) != getattr(value, "dtype", "none"):
                    loaded[name] = clone_tree(value, parameter.device)

    def _parameters(self) -> list[nn.Parameter]:
        """Returns the parameters in the order in which the optimizer numbers them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _is_own_optimizer(self) -> bool:
        """Returns whether the optimizer is the user's own class (see `build_optimizer`)."""
        return getattr(self.optimizer, "configured", None) is not None

    def evaluated_model(self) -> nn.Module:
        """Returns the model that is validated and tested: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def end_step(self, num_batches: int, metrics: RunningMetrics) -> None:
        """Counts an optimizer step over so many batches and sets the next learning rate."""
        self.running_metrics.merge(metrics)
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
        """Completes the current epoch.

        Args:
            metrics: of its validation, without the prefix val_.
            monitor: the metric that the best epoch is best in, such as val_acc.
            val_seconds: duration of the validation.
            predictions: of the validation; those of the best epoch are kept.

        Returns:
            Whether this is the best epoch so far.
        """
        running = self.running_metrics
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self.lr} | self.group_lrs
        row |= {f"train_{name}": value for name, value in running.compute().items()}
        row |= {f"val_{name}": value for name, value in metrics.items()}
        times = (int(running.count) / max(self.seconds, 1e-9), self.seconds + val_seconds)
        self.history.append(row | dict(zip(TIME_COLUMNS, times)))
        self.epoch += 1
        value = row[monitor]
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
        """Returns whether there is nothing left to train."""
        stops_early = patience is not None and self.epochs_since_best >= patience
        return self.batch == 0 and (self.epoch >= epochs or stops_early)


def state_of_one_parameter(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the state that the optimizer keeps for a parameter of shape (1), by name.

    It is found by a step of a copy. Entries of shape (1) are as large as the parameter in general,
    those of shape () are single numbers.
    """
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    group = {"params": [parameter], "capturable": False}  # capturable is for CUDA alone
    trial.param_groups = [optimizer.param_groups[0] | group]
    trial.step()
    return dict(trial.state[parameter])


def laid_out_like(tree: Any, parameter: nn.Parameter) -> Any:
    """Copies the state of a parameter into tensors with the parameter's strides.

    Fused optimizers assume these strides; those in a file may differ.
    """
    if isinstance(tree, dict):
        return {name: laid_out_like(value, parameter) for name, value in tree.items()}
    if not isinstance(tree, torch.Tensor):
        return tree
    if tree.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tree.dtype, device=tree.device).copy_(tree)
    return tree.clone(memory_format=torch.contiguous_format)


def check_like(tensor: Any, expected: torch.Tensor, name: str) -> None:
    """Raises ValueError where a tensor has another shape or dtype than expected."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")  # noqa: TRY004
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
        wanted, got = (
            f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (expected, tensor)
        )
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def own_lrs(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns the lower learning rates by their initial ratio to the highest: {"lr_x0.1": lr}."""
    highest = max(group["initial_lr"] for group in optimizer.param_groups)
    return {
        f"lr_x{group['initial_lr'] / highest:g}": group["lr"]
        for group in optimizer.param_groups
        if group["initial_lr"] != highest
    }
