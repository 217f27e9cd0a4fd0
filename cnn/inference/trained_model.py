"""A trained model out of its checkpoint, ready for use; the file has all that this needs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnn import config
from cnn.config import Config
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.models.build import build_model
from cnn.training.resume import DOES_NOT_FIT, check_code, naming, placed
from cnn.training.state import check_like
from cnn.utils import environment as env
from cnn.utils.checkpoint import load_checkpoint, validated_weights
from cnn.utils.module_state import load_state


@dataclass(frozen=True)
class TrainedModel:
    path: Path
    content: dict[str, Any]  # of the checkpoint
    cfg: Config  # its settings, with those typed now
    typed: set[str]
    places: dict[str, str]  # where each setting was given
    model: nn.Module  # in evaluation mode, on the device
    preprocessing: Preprocessing
    device: torch.device
    precision: str

    def autocast(self) -> torch.autocast:
        """Around a forward pass: the precision."""
        return env.autocast(self.device, self.precision)

    @property
    def classes(self) -> list[str]:
        return self.content["classes"]

    @property
    def is_within_epoch(self) -> bool:
        """Whether the weights are those of the middle of an epoch, which nothing was reported of."""
        return self.content["unfinished_epoch"]["batch"] > 0

    def drawing_epoch(self, split: str) -> int:
        """What training keyed a model that draws in an evaluation by, after these weights' epoch."""
        epoch = self.content["epoch"]
        return epoch if split == "test" or self.is_within_epoch else max(epoch - 1, 0)

    def __str__(self) -> str:
        content = self.content
        averaged = ", averaged weights" if content["ema_state_dict"] else ""
        within = f" and {content['unfinished_epoch']['batch']} batches" * self.is_within_epoch
        return (
            f"{self.path}: {self.cfg.model.name} after epoch {content['epoch']}{within}{averaged},"
            f" {len(self.classes)} classes"
        )


def load_trained_model(path: Path, settings: Sequence[str] = ()) -> TrainedModel:
    """Reads a checkpoint and builds its model with the weights that were validated.

    Args:
        settings: `key=value`, laid over those of the checkpoint.

    Raises:
        Refused: the file is none, damaged, or does not fit together; or it names code of others.
    """
    content = load_checkpoint(path, "--checkpoint")
    typed = {setting.partition("=")[0] for setting in settings}
    check_code(path, content["config"], typed)
    cfg, places = _read_settings(path, content["config"], settings, typed)
    device = env.choose_device(cfg.device)
    precision = _choose_precision(cfg, content["environment"], device, typed)
    pre = Preprocessing.from_checkpoint(path, content["preprocessing"])
    # The weights come out of the checkpoint; those that the run began with may be gone.
    begun = dataclasses.replace(cfg.model, weights=None, pretrained=False)
    number = len(content["classes"])
    try:
        model = build_model(begun, number, pre.channels, pre.image_size, cfg.seed)
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from None
    model = model.to(device, memory_format=torch.channels_last)
    _load_weights(path, model, content)
    places = placed(places, path)
    return TrainedModel(path, content, cfg, typed, places, model.eval(), pre, device, precision)


def _read_settings(
    path: Path, saved: dict[str, Any], settings: Sequence[str], typed: set[str]
) -> tuple[Config, dict[str, str]]:
    """The checkpoint's settings under those typed now, and where each was given."""
    with naming(path):
        cfg, places = config.load_config(None, settings, saved)
    then, now = config.flat(saved), config.flat(config.to_dict(cfg))
    # Typed, these only say that their code is meant to run; other data it may be given.
    for key in typed.intersection(config.code_keys()) - {"data.name"}:
        if then.get(key) != now[key]:
            has = config.as_text(then.get(key))
            raise Refused(f"{key}: {path} has {has}, and a trained model keeps it")
    if then.get("data.name") != cfg.data.name and "data.args" not in typed:
        cfg = config.with_values(cfg, data={"args": {}})  # those were another set's
    return cfg, places


def _choose_precision(
    cfg: Config, then: dict[str, Any], device: torch.device, typed: set[str]
) -> str:
    """The run's own on its own kind of device; elsewhere what is quick there, unless it was fp32."""
    name = cfg.train.precision
    trained_on = then.get("device") if then.get("device") in ("cpu", "mps") else "cuda"
    if "train.precision" not in typed and name != "fp32":
        if trained_on == device.type and then["precision"] in env.DTYPES:
            return then["precision"]
        name = "auto"
    return env.choose_precision(name, device)


def _load_weights(path: Path, model: nn.Module, content: dict[str, Any]) -> None:
    weights, expected = validated_weights(content), model.state_dict()
    try:
        for name, tensor in weights.items():
            if isinstance(expected.get(name), torch.Tensor):
                check_like(tensor, expected[name], name)
        load_state(model, weights)
    except DOES_NOT_FIT as error:
        lines = [line.strip() for line in str(error).strip().splitlines()[:3]]
        raise Refused(f"{path}: its weights do not fit its model: {' '.join(lines)}") from None
