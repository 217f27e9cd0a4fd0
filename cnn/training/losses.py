"""The loss function: cross-entropy, or one of the user's."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cnn.config import LossConfig
from cnn.errors import Refused
from cnn.utils.importing import import_object


def build_loss(cfg: LossConfig, labels: np.ndarray, classes: list[str]) -> nn.Module:
    """Builds the loss function.

    Args:
        cfg: the settings of the loss.
        labels: the class index of each training image, an int64 array (N). The labels are used only
            for the setting `class_weights: balanced`.
        classes: the names of the classes, in the order of the logits.

    Returns:
        A module that takes logits (N, classes) and labels (N), and returns the mean loss ().

    Raises:
        Refused: the number of class weights differs from the number of classes, or the user's own
            loss function cannot be used. For example, it has trainable parameters or does not take
            the keywords in `loss.args`.
    """
    weights = _class_weights(cfg.class_weights, labels, classes)
    return LOSSES[cfg.name](cfg, weights) if cfg.name in LOSSES else _build_user_loss(cfg)


# Each builds a loss from its settings and the weights of the classes.
LOSSES: dict[str, Callable[[LossConfig, torch.Tensor | None], nn.Module]] = {
    "cross_entropy": lambda cfg, weights: nn.CrossEntropyLoss(
        weights, label_smoothing=cfg.label_smoothing
    )
}


def has_state(loss: nn.Module) -> bool:
    """Returns whether checkpoints contain the state dict of a loss function.

    The result is False for cross-entropy, and True for every other loss function.
    """
    return not isinstance(loss, nn.CrossEntropyLoss)


def class_weights(loss: nn.Module) -> list[float] | None:
    """Returns the class weights of a loss function as plain numbers.

    Returns:
        One weight per class. None if the loss is not cross-entropy or has no class weights.
    """
    weights = None if has_state(loss) else loss.weight
    return None if weights is None else weights.tolist()


def _build_user_loss(cfg: LossConfig) -> nn.Module:
    found = import_object(cfg.name, "loss.name")
    try:
        loss = found(**cfg.args) if isinstance(found, type) else found
    except TypeError as error:
        raise Refused(f"loss.args: {cfg.name}: {error}") from error
    if not isinstance(loss, nn.Module):
        function, loss = loss, nn.Module()
        loss.forward = function
    if any(parameter.requires_grad for parameter in loss.parameters()):
        advice = "only the model's are trained; make them part of the model, or buffers"
        raise Refused(f"loss.name: {cfg.name} has parameters, and {advice}")
    return loss


def _class_weights(
    setting: str | list[float] | None, labels: np.ndarray, classes: list[str]
) -> torch.Tensor | None:
    if setting is None:
        return None
    if setting == "balanced":  # King and Zeng (2001): N / (number of classes * N of the class)
        counts = np.bincount(labels, minlength=len(classes))
        setting = len(labels) / (len(classes) * np.maximum(counts, 1))
    if len(setting) != len(classes):
        names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        expected = f"a number for each of the {len(classes)} classes ({names})"
        raise Refused(f"loss.class_weights: expected {expected}, got {len(setting)}")
    return torch.tensor(setting, dtype=torch.float32)
