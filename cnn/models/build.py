"""The models by name, and the steps from a name to a model."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from cnn.config import ModelConfig, is_import_path
from cnn.errors import Refused, first_line
from cnn.models import torchvision_models
from cnn.models.lenet5 import LeNet5
from cnn.models.resnet import ResNet9, ResNet20
from cnn.models.simple_cnn import SimpleCNN
from cnn.models.weights import arrange_head, load_weights, read_weights, shapes_of
from cnn.utils import seeding
from cnn.utils.importing import import_object
from cnn.utils.module_state import state_preserved

MODELS = {"simple_cnn": SimpleCNN, "lenet5": LeNet5, "resnet9": ResNet9, "resnet20": ResNet20}


def build_model(
    cfg: ModelConfig, classes: list[str], in_channels: int, image_size: int, seed: int | None
) -> nn.Module:
    """Builds a model on the CPU and checks that the model takes images.

    The initial weights depend only on the settings, the names of the classes and the seed. If the
    file `cfg.weights` names other classes, or another order, the rows of the head are assigned to
    the classes by name. For the check, the model computes the logits of two black images.

    Args:
        cfg: the section `model` of the settings.
        classes: the names of the classes, in the order of the logits.
        in_channels: number of image channels.
        image_size: height and width of the images in pixels.
        seed: the seed of the run. None for a model whose weights are loaded afterwards; the random
            generators are then not seeded.

    Raises:
        Refused: there is no such model, or the model does not take the arguments in `cfg.args`. The
            initial weights do not fit the model or cannot be loaded. The model cannot take images
            of this size.
    """
    shape, wider = (in_channels, image_size, image_size), {}
    state, known = read_weights(Path(cfg.weights)) if cfg.weights else ({}, [])
    others = known and known != classes
    if others:  # before the seeding, so that the model to be trained draws the same numbers
        with contextlib.suppress(Exception):  # a user's model may refuse another number
            wider = shapes_of(_build(cfg, len(classes) + 1, shape))
    if seed is not None:
        seeding.seed_sample(seed, seeding.INIT)
    model = _build(cfg, len(classes), shape)
    if cfg.weights:
        note = arrange_head(model, state, known, classes, wider) if others else ""
        load_weights(model, Path(cfg.weights), state, note)
    return model


def _build(cfg: ModelConfig, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Builds a model and checks that the model takes images.

    Args:
        cfg: the section `model` of the settings. The file `cfg.weights` is not read.
        num_classes: number of logits per image.
        shape: the shape of one image, (channels, height, width).

    Raises:
        Refused: there is no such model, the model does not take the arguments in `cfg.args`, or the
            model cannot take images of this shape.
    """
    pretrained = cfg.pretrained and not cfg.weights
    if cfg.name in MODELS or is_import_path(cfg.name):
        kind = MODELS.get(cfg.name) or import_object(cfg.name, "model.name")
        if pretrained:
            raise Refused(f"model.pretrained: only torchvision models have weights, not {cfg.name}")
        try:
            model = kind(num_classes=num_classes, in_channels=shape[0], **cfg.args)
        except (TypeError, ValueError, RuntimeError) as error:
            if cfg.name not in MODELS and not isinstance(error, TypeError):
                raise  # an error in the user's code, for which a traceback helps
            raise Refused(f"model.args: {cfg.name}: {error}") from error
    else:
        model = torchvision_models.build(cfg.name, num_classes, shape[0], pretrained, cfg.args)
    # Before weights are loaded, because lazy layers have no shapes before the first images.
    _try_out(model, cfg.name, num_classes, shape)
    return model


def _try_out(model: nn.Module, name: str, num_classes: int, shape: tuple[int, ...]) -> None:
    """Lets a model compute the logits of two black images, as a check.

    The state of the model and the training mode are the same afterwards.

    Args:
        model: the model.
        name: the name of the model in the settings, for messages.
        num_classes: the expected number of logits per image.
        shape: the shape of one image, (channels, height, width).

    Raises:
        Refused: the model fails, or the output is not a tensor of shape (2, num_classes).
    """
    training = model.training
    model.eval()
    with torch.no_grad(), state_preserved(model):
        try:
            logits = model(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            size, reason = "x".join(map(str, shape)), first_line(error)
            advice = f"({reason}); a larger data.image_size may help"
            raise Refused(f"model.name: {name} cannot take images of {size} {advice}") from error
    model.train(training)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != (2, num_classes):
        raise Refused(f"model.name: {name}: expected logits of shape (2, {num_classes}), got {got}")
