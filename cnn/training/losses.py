"""The loss function: cross-entropy, or one of the user's."""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from cnn.config import LossConfig
from cnn.errors import Refused, describe
from cnn.utils.importing import import_object

FITS = "cross_entropy fits, or torch.nn:MultiMarginLoss, or one such as examples.own_loss:Focal"
EQUAL_LOGIT = 5.0  # of every class in a trial; a loss that takes log-probabilities is then -5


def build_loss(
    cfg: LossConfig, labels: np.ndarray, classes: list[str], device: torch.device | str = "cpu"
) -> nn.Module:
    """Builds the loss function, and tries one of the user's on two or three images.

    Args:
        cfg: the settings of the loss.
        labels: the class index of each training image, an int64 array (N). The labels are used only
            for the setting `class_weights: balanced`.
        classes: the names of the classes, in the order of the logits.
        device: the device of the logits.

    Returns:
        A module that takes logits (N, classes) and labels (N), and returns the mean loss ().

    Raises:
        Refused: the number of class weights differs from the number of classes, or the user's own
            loss function cannot be used. For example, it has trainable parameters, does not take
            the keywords in `loss.args`, or needs other targets than the index of a class.
    """
    weights = _class_weights(cfg.class_weights, labels, classes)
    if cfg.name in LOSSES:
        return LOSSES[cfg.name](cfg, weights).to(device)
    loss = _build_user_loss(cfg).to(device)
    _try(copy.deepcopy(loss), cfg.name, len(classes), device)
    return loss


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


def _try(loss: nn.Module, name: str, num_classes: int, device: torch.device | str) -> None:
    """Raises Refused if a loss function cannot compute the mean loss of a few images.

    Args:
        loss: the loss function.
        name: the value of the setting `loss.name`.
        num_classes: the number of classes. The number of images differs from it, since otherwise a
            loss of equal shapes would take the labels for one number per class.
        device: the device of the loss function.
    """
    number = 3 if num_classes == 2 else 2
    shape, options = (number, num_classes), {"device": device, "requires_grad": True}
    logits = torch.full(shape, EQUAL_LOGIT, **options)
    labels = torch.arange(number, device=device) % num_classes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about shapes, before an error about them
            value = loss(logits, labels)
    except Exception as error:
        given = f"logits {shape} and the index of each image's class ({number},)"
        if "deterministic implementation" in str(error):
            raise  # whatever is given
        fault = f"does not take {given}; {FITS}"
        raise Refused(f"loss.name: {name} {fault} ({describe(error)})") from None
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise Refused(f"loss.name: {name}: expected the mean loss () (reduction: mean), got {got}")
    if value == -EQUAL_LOGIT:
        fault = "takes the logits for logarithms of probabilities, which they are not"
        raise Refused(f"loss.name: {name} {fault}; {FITS}")


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
