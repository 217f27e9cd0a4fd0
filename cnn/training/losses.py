"""The loss function: cross-entropy, or the user's own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cnn.config import LossConfig
from cnn.errors import Refused
from cnn.utils.importing import import_object


def build_loss(cfg: LossConfig, labels: np.ndarray, classes: list[str]) -> nn.Module:
    """Builds the loss: logits (N, classes) and labels (N) to a mean ().

    Args:
        labels: of the training images, for balanced class weights.

    Raises:
        Refused: weights that do not fit the classes, keywords that the loss does not take.
    """
    weights = _class_weights(cfg.class_weights, labels, classes)
    return LOSSES[cfg.name](cfg, weights) if cfg.name in LOSSES else _own(cfg)


def _cross_entropy(cfg: LossConfig, weights: torch.Tensor | None) -> nn.Module:
    return nn.CrossEntropyLoss(weights, label_smoothing=cfg.label_smoothing)


# From the settings and the weights of the classes.
LOSSES: dict[str, Callable[[LossConfig, torch.Tensor | None], nn.Module]] = {
    "cross_entropy": _cross_entropy
}


def has_state(loss: nn.Module) -> bool:
    """Whether what the loss holds is its own, and not the settings' as cross-entropy's weights are."""
    return not isinstance(loss, nn.CrossEntropyLoss)


def class_weights(loss: nn.Module) -> list[float] | None:
    """The weights of cross-entropy, for the checkpoint: other data would be balanced otherwise."""
    weights = loss.weight if isinstance(loss, nn.CrossEntropyLoss) else None
    return None if weights is None else weights.tolist()


class _Function(nn.Module):
    """A plain function of the user's as a module."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.function(logits, labels)


def _own(cfg: LossConfig) -> nn.Module:
    found = import_object(cfg.name, "loss.name")
    try:
        made = found(**cfg.args) if isinstance(found, type) else found
    except TypeError as error:
        raise Refused(f"loss.args: {cfg.name}: {error}") from error
    made = made if isinstance(made, nn.Module) else _Function(made)
    if any(parameter.requires_grad for parameter in made.parameters()):
        raise Refused(
            f"loss.name: {cfg.name} has parameters, and only the model's are trained; make them"
            f" part of the model, or buffers"
        )
    return made


def _class_weights(
    given: str | list[float] | None, labels: np.ndarray, classes: list[str]
) -> torch.Tensor | None:
    if given is None:
        return None
    if given == "balanced":  # King and Zeng (2001): images over classes times images of the class
        counts = np.bincount(labels, minlength=len(classes))
        weights = len(labels) / (len(classes) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32)
    if len(given) != len(classes):
        raise Refused(
            f"loss.class_weights: expected a number for each of the {len(classes)} classes"
            f" ({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}), got {len(given)}"
        )
    return torch.tensor(given, dtype=torch.float32)
