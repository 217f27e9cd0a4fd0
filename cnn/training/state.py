"""Everything that changes during a run, in one object, with its save and its load side by side."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnn.config.settings import TrainConfig
from cnn.metrics.running import RunningMetrics
from cnn.metrics.scores import Metrics, is_better
from cnn.training.schedule import Schedule
from cnn.utils.checkpoint import clone_tree
from cnn.utils.module_state import load_state

# Attributes that are plain values and stand in a checkpoint under their own names.
PLAIN_ATTRIBUTES = (
    *("epoch", "step", "lr", "group_lrs", "best", "history", "test", "predictions", "temperature"),
)
TIME_COLUMNS = ("images_per_second", "seconds")  # last ones of history; they differ between runs


class TrainingState:
    """The state of a run: everything that changes during training.

    The state is valid between optimizer steps.

    Args:
        model: the model.
        optimizer: the optimizer.
        schedule: the schedule of the learning rate.
        scaler: the gradient scaler.
        device: the device of the model.
        ema_decay: the decay of the exponential moving average of the weights. If None, no average
            is computed.
        loss: the user's own loss function, which can have a state. None for cross-entropy.

    Attributes:
        ema: the model with averaged weights (AveragedModel). None if no average is computed.
        epoch: the number of completed epochs.
        step: the number of optimizer steps taken.
        batch: the number of completed training batches of the current epoch. After the validation,
            the number is 0 again.
        running_metrics: the sums over the completed training batches of the current epoch.
        seconds: the time spent on the training batches of the current epoch, in seconds.
        lr: the highest learning rate of all parameter groups in the latest step.
        group_lrs: further learning rates in the latest step, by name. Each parameter group whose
            initial learning rate is below the highest one has an entry. For example, {"lr_x0.1":
            0.005} belongs to a group that starts at 0.1 times the highest rate.
        best: the best epoch so far, such as {"epoch": 5, "metric": "val_acc", "value": 0.98}. None
            if there is no best epoch yet.
        epochs_since_best: the number of completed epochs after the best epoch.
        history: a list with one dict of metrics for every completed epoch.
        test: the metrics of the final test. None before the test.
        predictions: the predictions by split. The key "val" has the validation images in the best
            epoch, and the key "test" the test images. Each value is a dict of two tensors, the
            predicted classes and their probabilities.
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
        self.temperature: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as a dict of tensors and plain values."""
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
        """Restores a saved state.

        If an older checkpoint lacks an entry such as "history", the attribute keeps its value.

        Args:
            saved: the content of a checkpoint, by name.

        Raises:
            ValueError: a tensor is missing, or has another shape or dtype than in the model or
                optimizer.
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
        """Raises ValueError if saved tensors do not fit the model or the optimizer.

        Names, shapes and dtypes are compared. Torch alone would accept, ignore or convert some
        unsuitable tensors.

        Args:
            saved: a state that `state_dict` returned.
        """
        weights = self.model.state_dict()
        missing = sorted(weights.keys() - saved["model_state_dict"].keys())
        if missing:
            raise ValueError(f"model_state_dict.{missing[0]}: missing")
        for part in ("model_state_dict", "ema_state_dict"):
            for name, tensor in (saved[part] or {}).items():
                if isinstance(weights.get(name), torch.Tensor):  # else a module's extra state
                    check_like(tensor, weights[name], f"{part}.{name}")
        parameters, of_optimizer = self.parameters(), saved["optimizer_state_dict"]
        indices = [i for group in of_optimizer["param_groups"] for i in group["params"]]
        number = len(parameters)
        if indices != list(range(number)):
            raise ValueError(f"optimizer_state_dict: expected {number} parameters in order")
        if self._is_own_optimizer():
            return  # its state may hold anything
        expected = state_of_one_parameter(self.optimizer)
        for index, state in of_optimizer["state"].items():
            if not 0 <= index < len(parameters):
                raise ValueError(f"optimizer_state_dict.state.{index}: no such parameter")
            for name, like in expected.items():
                key = f"optimizer_state_dict.state.{index}.{name}"
                check_like(state.get(name), parameters[index] if like.ndim else like, key)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Loads a saved state into the optimizer, but keeps the optimizer's present settings.

        A setting, such as the momentum, can have changed since the state was saved. If the initial
        learning rate was doubled, the saved learning rate is doubled as well. An optimizer of the
        user's own takes options without a setting from the saved state.

        Args:
            saved: a state dict of the optimizer.
        """
        built = [dict(group) for group in self.optimizer.param_groups]
        is_own, parameters = self._is_own_optimizer(), self.parameters()
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
            else:  # an unknown key would pass from checkpoint to checkpoint
                for key in group.keys() - settings.keys():
                    del group[key]
            group |= {key: settings[key] for key in kept}
            group["lr"] = lr

    def _undo_casts(self, saved: dict[Any, Any]) -> None:
        """Gives the optimizer's loaded state the dtypes of the saved state.

        When torch loads a state, torch casts tensors to the dtypes of the parameters.

        Args:
            saved: the saved state of each parameter, by the index of the parameter.
        """
        for index, parameter in enumerate(self.parameters()):
            state = saved.get(index)
            for name, value in state.items() if isinstance(state, dict) else ():
                loaded = self.optimizer.state[parameter]
                if getattr(loaded.get(name), "dtype", None) != getattr(value, "dtype", "none"):
                    loaded[name] = clone_tree(value, parameter.device)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the optimizer's parameters, in the order of the optimizer's state dict."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _is_own_optimizer(self) -> bool:
        """Returns whether the optimizer is one of the user's own.

        A known optimizer, such as "sgd", gives False.
        """
        return getattr(self.optimizer, "configured", None) is not None

    def evaluated_model(self) -> nn.Module:
        """Returns the model that is validated and tested.

        The result is the model with averaged weights if an average is computed. Otherwise, the
        result is the trained model.
        """
        return self.ema.module if self.ema is not None else self.model

    def end_step(self, num_batches: int, metrics: RunningMetrics) -> None:
        """Records a completed optimizer step, and sets the next learning rate.

        Args:
            num_batches: the number of batches in the completed step.
            metrics: the sums over the images of these batches in all processes.
        """
        self.running_metrics.merge(metrics)
        groups = self.optimizer.param_groups
        self.lr = max(group["lr"] for group in groups)
        highest = max(group["initial_lr"] for group in groups)
        lower = [group for group in groups if group["initial_lr"] != highest]
        self.group_lrs = {f"lr_x{g['initial_lr'] / highest:g}": g["lr"] for g in lower}
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
        """Adds the metrics of the current epoch to the history, and ends the epoch.

        Args:
            metrics: the metrics of the validation, such as {"loss": 0.1, "acc": 0.98}.
            monitor: the metric by which the best epoch is chosen, such as "val_acc". Of epochs that
                are equally good, the one with the lowest validation loss is chosen.
            val_seconds: the duration of the validation in seconds.
            predictions: the predicted class of every validation image, and the probability of the
                class. The predictions are kept if the epoch is the best one so far. None means no
                predictions.

        Returns:
            Whether the completed epoch is the best one so far.
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
        best = self.history[self.best["epoch"] - 1] if self.best else {}
        improved = is_better(monitor, row, best)
        if improved:
            self.best = {"metric": monitor, "value": value, "epoch": self.epoch}
            self.predictions = {} if predictions is None else {"val": predictions}
        self.epochs_since_best = 0 if improved else self.epochs_since_best + 1
        return improved

    def is_finished(self, cfg: TrainConfig) -> bool:
        """Returns whether the training is finished.

        Training is finished after the last epoch, or after early stopping.

        Args:
            cfg: the settings of the training. If the setting `early_stop_patience` is None, there
                is no early stopping.
        """
        patience = cfg.early_stop_patience
        stops_early = patience is not None and self.epochs_since_best >= patience
        return self.batch == 0 and (self.epoch >= cfg.epochs or stops_early)


def state_of_one_parameter(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns an example of the state that an optimizer keeps for each parameter.

    The example belongs to a parameter of shape (1).

    Args:
        optimizer: the optimizer, which does not change.

    Returns:
        The tensors by name, such as {"momentum_buffer": ...}. A tensor of shape (1) stands for a
        tensor with the shape of the parameter. A tensor of shape () is a single number for every
        parameter.
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
    """Returns a copy of an optimizer's state, with the strides of a parameter.

    Fused optimizers need the strides of the parameter, but tensors from a file can have other
    strides. A tensor whose shape differs from the shape of the parameter becomes contiguous.

    Args:
        tree: the state of one parameter, a tensor or a dict of tensors and other values. The other
            values are not copied.
        parameter: the parameter to which the state belongs.
    """
    if isinstance(tree, dict):
        return {name: laid_out_like(value, parameter) for name, value in tree.items()}
    if not isinstance(tree, torch.Tensor):
        return tree
    if tree.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tree.dtype, device=tree.device).copy_(tree)
    return tree.clone(memory_format=torch.contiguous_format)


def check_like(tensor: Any, expected: torch.Tensor, name: str) -> None:
    """Raises ValueError if a value is no tensor of the expected shape and dtype.

    Args:
        tensor: the value to check.
        expected: a tensor with the expected shape and dtype.
        name: the name of the value in the error message, such as "model_state_dict.fc.weight".
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")  # noqa: TRY004
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
        wanted, got = (f"{t.dtype} {tuple(t.shape)}" for t in (expected, tensor))
        raise ValueError(f"{name}: expected {wanted}, got {got}")
