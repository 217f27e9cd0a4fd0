"""Loading a trained model from its checkpoint, which is the only file needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnn import config
from cnn.config import Config, is_import_path
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.inference.host import OwnGenerator, generators_borrowed
from cnn.models.build import build_model
from cnn.training.resume import DOES_NOT_FIT, check_code, reason_of
from cnn.training.state import check_like
from cnn.utils import environment as env
from cnn.utils.checkpoint import load_checkpoint, position_text, validated_weights
from cnn.utils.module_state import load_state, state_preserved


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with the weights of a checkpoint, and its settings.

    Attributes:
        path: the file of the checkpoint.
        content: the entries of the checkpoint by name.
        cfg: the settings in the checkpoint, changed by the settings of the command line.
        typed: the keys of the settings on the command line, such as {"data.root"}.
        places: the origin of each setting by the key of the setting, such as {"data.root": "command
            line"}.
        model: the network. The network takes normalized images (N, C, size, size) and returns
            logits (N, classes).
        preprocessing: the size, the number of channels and the normalization of the images.
        device: the device of the model.
        precision: the precision of a forward pass: "fp32", "bf16" or "fp16".
        draws: whether the model seems to draw random numbers in evaluation mode.
    """

    path: Path
    content: dict[str, Any]
    cfg: Config
    typed: set[str]
    places: dict[str, str]
    model: nn.Module
    preprocessing: Preprocessing
    device: torch.device
    precision: str
    draws: bool

    def autocast(self) -> torch.autocast:
        """Returns the context manager for a forward pass with the precision `self.precision`."""
        return env.autocast(self.device, self.precision)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return self.content["classes"]

    @property
    def temperature(self) -> float:
        """The number by which the logits are divided before the softmax.

        It belongs to the best epoch; in last.pth, the weights can be those of another epoch.
        """
        best, temperature = self.content["best"], self.content.get("temperature")
        is_best = best is not None and best["epoch"] == self.content["epoch"]
        return temperature if temperature and is_best and not self.is_within_epoch else 1.0

    @property
    def threshold(self) -> float | None:
        """The least probability of a positive prediction; None if the likelier class is predicted.

        With the option --save-threshold, evaluate.py writes it into a checkpoint.
        """
        return self.content.get("threshold")

    @property
    def is_within_epoch(self) -> bool:
        """Whether the checkpoint was saved in the middle of an epoch.

        The weights of such a checkpoint were never validated.
        """
        return self.content["unfinished_epoch"]["batch"] > 0

    def seed_epoch(self, split: str) -> int:
        """Returns the epoch number that seeds the random numbers of an evaluation.

        The training used the same number when it evaluated the same weights. Therefore, a model
        that draws random numbers in evaluation mode draws the same numbers again.

        Args:
            split: "val" or "test".

        Returns:
            For "test", the number of complete epochs. For "val", one less, but at least 0. For a
            checkpoint from the middle of an epoch, the number of complete epochs for both splits.
        """
        epoch = self.content["epoch"]
        return epoch if split == "test" or self.is_within_epoch else max(epoch - 1, 0)

    def __str__(self) -> str:
        averaged = ", averaged weights" if self.content["ema_state_dict"] else ""
        trained = f"{self.cfg.model.name} {position_text(self.content)}{averaged}"
        positive = f", positive: {self.classes[1]}" if len(self.classes) == 2 else ""
        if self.threshold is not None:
            positive += f" from probability {self.threshold:.4f} on"
        return f"{self.path}: {trained}, {len(self.classes)} classes{positive}"


def load_trained_model(path: Path, settings: Sequence[str] = ()) -> TrainedModel:
    """Loads the trained model in a checkpoint.

    If the training averaged the weights (EMA), the model has the averaged weights.

    Args:
        path: a checkpoint that train.py saved.
        settings: settings in the form of the command line, such as "device=cpu". These settings
            replace settings in the checkpoint.

    Raises:
        Refused: the file is not a checkpoint, or is damaged or inconsistent. A setting that is not
            valid, or may not be replaced, is refused, too. A checkpoint that names Python code
            outside the current folder is refused, too.
    """
    content = load_checkpoint(path, "--checkpoint")
    typed = {setting.partition("=")[0] for setting in settings}
    check_code(path, content["config"], typed)
    cfg, places = _read_settings(path, content["config"], settings, typed)
    device = env.choose_device(cfg.device)
    precision = _choose_precision(cfg, content["environment"], device, typed)
    pre = Preprocessing.from_checkpoint(path, content["preprocessing"])
    model = _build_model(path, content, cfg, pre, device)
    draws = is_import_path(cfg.model.name) and _draws(model, pre, device)
    return TrainedModel(path, content, cfg, typed, places, model, pre, device, precision, draws)


def _build_model(
    path: Path, content: dict[str, Any], cfg: Config, pre: Preprocessing, device: torch.device
) -> nn.Module:
    """Builds the model of a checkpoint, with the validated weights, in evaluation mode.

    Only a user's own model uses the global random generators.
    """
    is_own = is_import_path(cfg.model.name)
    # All weights are in the checkpoint; the file that training started from may no longer exist.
    model_cfg = replace(cfg.model, weights=None, pretrained=False)
    shape, seed = (pre.channels, pre.image_size), cfg.seed if is_own else None
    try:
        with generators_borrowed() if is_own else OwnGenerator():
            model, _ = build_model(model_cfg, content["classes"], *shape, seed)
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from None
    if torch.get_default_dtype() != torch.float32:  # another program may have changed it
        model = model.float()
    model = model.to(device, memory_format=torch.channels_last)
    _load_weights(path, model, validated_weights(content))
    return model.eval()


def _draws(model: nn.Module, pre: Preprocessing, device: torch.device) -> bool:
    """Returns whether a model in evaluation mode computes different logits each time.

    A model that draws random numbers does.

    Args:
        model: the model, whose state is the same afterwards.
        pre: the shape of the images.
        device: the device of the model.
    """
    shape = (8, *pre.shape)
    images = torch.linspace(-2, 2, math.prod(shape), dtype=torch.float32).reshape(shape).to(device)
    with torch.no_grad(), generators_borrowed(device), state_preserved(model):
        first, *others = [model(images) for _ in range(3)]
    return not all(torch.equal(first, other) for other in others)


def _read_settings(
    path: Path, saved: dict[str, Any], settings: Sequence[str], typed: set[str]
) -> tuple[Config, dict[str, str]]:
    cfg, places = config.load_config(None, settings, saved, f"checkpoint {path}")
    before, now = config.flat(saved), config.flat(config.to_dict(cfg))
    # A key on the command line that names code permits this code to run, but may not change it.
    # Only the data may be replaced.
    for key in typed.intersection(config.code_keys()) - {"data.name"}:
        if before.get(key) != now[key]:
            value = config.as_text(before.get(key))
            raise Refused(f"{key}: expected {value} as in {path}; a trained model keeps it")
    if before.get("data.name") != cfg.data.name and "data.args" not in typed:
        cfg = config.with_values(cfg, data={"args": {}})  # the old ones are for the other data
    return cfg, places


def _choose_precision(
    cfg: Config, saved: dict[str, Any], device: torch.device, typed: set[str]
) -> str:
    """Chooses the precision of a forward pass.

    A precision on the command line is always used. Otherwise, the setting train.precision in the
    checkpoint counts. If this setting is "fp32", the result is "fp32". Otherwise, if the training
    used the same type of device, the result is the precision of the training. On another type of
    device, the result is the default precision of that device.

    Args:
        cfg: the settings in the checkpoint, changed by the settings of the command line.
        saved: the entry "environment" of the checkpoint, with the device and the precision of the
            training.
        device: the device of the model.
        typed: the keys of the settings on the command line, such as {"train.precision"}.

    Returns:
        "fp32", "bf16" or "fp16".
    """
    name = cfg.train.precision
    if "train.precision" in typed or name == "fp32":
        return env.choose_precision(name, device)
    trained_on = saved.get("device") if saved.get("device") in ("cpu", "mps") else "cuda"
    is_known = trained_on == device.type and saved["precision"] in env.DTYPES
    return saved["precision"] if is_known else env.choose_precision("auto", device)


def _load_weights(path: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    expected = model.state_dict()
    try:
        for name, tensor in weights.items():
            if isinstance(expected.get(name), torch.Tensor):
                check_like(tensor, expected[name], name)
        load_state(model, weights)
    except DOES_NOT_FIT as error:
        reason = reason_of(error)
        raise Refused(f"{path}: its weights do not fit its model: {reason}") from None
