"""The models by name, and the steps from a name to a model."""

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cnn.config import ModelConfig, is_import_path
from cnn.errors import Refused, first_line
from cnn.models import efficientnet_lite0, timm_models, torchvision_models
from cnn.models.efficientnet_lite0 import EfficientNetLite0
from cnn.models.lenet5 import LeNet5
from cnn.models.resnet import ResNet9, ResNet20
from cnn.models.simple_cnn import SimpleCNN
from cnn.models.weights import (
    Tensors,
    arrange_head,
    load_weights,
    read_weights,
    shapes_of,
    use_names,
)
from cnn.utils import seeding
from cnn.utils.importing import import_object
from cnn.utils.module_state import state_preserved

MODELS = {
    "simple_cnn": SimpleCNN,
    "lenet5": LeNet5,
    "resnet9": ResNet9,
    "resnet20": ResNet20,
    "efficientnet_lite0": EfficientNetLite0,
}
# The functions that read the weights of these models for ImageNet.
PRETRAINED = {"efficientnet_lite0": efficientnet_lite0.read_pretrained}

# The usual names of the keywords of a user's own model; ours come first.
CLASSES_KEYWORDS = ("num_classes", "n_classes", "nb_classes", "classes", "num_labels", "out_dim")
CHANNELS_KEYWORDS = ("in_channels", "in_chans", "in_ch", "n_channels", "input_channels", "channels")


def build_model(
    cfg: ModelConfig, classes: list[str], in_channels: int, image_size: int, seed: int | None
) -> tuple[nn.Module, list[str]]:
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

    Returns:
        Two values. The first is the model. The second is the names of the parameters that are new,
        if the others come from weights. Without weights, the list is empty.

    Raises:
        Refused: there is no such model, or the model does not take the arguments in `cfg.args`. The
            initial weights do not fit the model or cannot be loaded. The model cannot take images
            of this size.
    """
    shape, wider, new = (in_channels, image_size, image_size), {}, []
    state, known, source = _read_initial_weights(cfg)
    others = known and known != classes
    if others:  # before the seeding, so that the model to be trained draws the same numbers
        with contextlib.suppress(Exception):  # a user's model may refuse another number
            wider = shapes_of(_build(cfg, len(classes) + 1, shape))
    if seed is not None:
        seeding.seed_sample(seed, seeding.INIT)
    model = _build(cfg, len(classes), shape)
    if source:
        state = use_names(state, model.state_dict())
        note = arrange_head(model, state, known, classes, wider) if others else ""
        new = load_weights(model, source, state, note, partial=cfg.partial_weights)
    return model, new


def _read_initial_weights(cfg: ModelConfig) -> tuple[Tensors, list[str], str]:
    """Reads the weights from which the training starts.

    Returns:
        Three values: the weights by name, the names of the classes if the file has them, and where
        the weights come from. All are empty if the settings ask for no weights.

    Raises:
        Refused: the file cannot be read, or there are no weights for the model.
    """
    if cfg.weights:
        return *read_weights(Path(cfg.weights)), cfg.weights
    if not cfg.pretrained:
        return {}, [], ""
    if cfg.name in PRETRAINED:
        state = PRETRAINED[cfg.name]()
    elif cfg.name in MODELS or is_import_path(cfg.name):
        known = ", ".join(PRETRAINED)
        reason = f"only {known}, torchvision's and timm's models have weights, not {cfg.name}"
        raise Refused(f"model.pretrained: {reason}")
    elif cfg.name.startswith(timm_models.PREFIX):
        state = timm_models.fetch(cfg.name, cfg.args)
    else:
        state = torchvision_models.fetch(cfg.name)
    return state, [], "ImageNet"


def _build(cfg: ModelConfig, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Builds a model and checks that the model takes images.

    Args:
        cfg: the section `model` of the settings. No weights are read.
        num_classes: number of logits per image.
        shape: the shape of one image, (channels, height, width).

    Raises:
        Refused: there is no such model, the model does not take the arguments in `cfg.args`, or the
            model cannot take images of this shape.
    """
    if cfg.name in MODELS or is_import_path(cfg.name):
        kind = MODELS.get(cfg.name) or import_object(cfg.name, "model.name")
        words = _keywords(kind, cfg.name, num_classes, shape[0])
        try:
            model = kind(**words, **cfg.args)
        except (TypeError, ValueError, RuntimeError) as error:
            if cfg.name not in MODELS and not isinstance(error, TypeError):
                raise  # an error in the user's code, for which a traceback helps
            raise Refused(f"model.args: {cfg.name}: {error}") from error
    else:
        is_timm = cfg.name.startswith(timm_models.PREFIX)
        build = timm_models.build if is_timm else torchvision_models.build
        model = build(cfg.name, num_classes, shape[0], cfg.args)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise Refused(f"model.name: {cfg.name}: expected a torch.nn.Module, got {kind}")
    # Before weights are loaded, because lazy layers have no shapes before the first images.
    _try_out(model, cfg.name, num_classes, shape)
    return model


def _keywords(kind: Callable, name: str, num_classes: int, in_channels: int) -> dict[str, int]:
    """Returns the number of classes and of channels by the keywords that a model takes.

    Args:
        kind: the class of the model, or a function that returns a model.
        name: the name of the model in the settings, for the message of the error.
        num_classes: number of logits per image.
        in_channels: number of image channels.

    Raises:
        Refused: no usual name of these keywords is among the parameters.
    """
    parameters = inspect.signature(kind).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    words = {}
    for names, number in ((CLASSES_KEYWORDS, num_classes), (CHANNELS_KEYWORDS, in_channels)):
        usual = names[0] if takes_all else None
        word = next((name for name in names if name in parameters), usual)
        if word is None:
            module, _, attribute = name.partition(":")
            raise Refused(
                f"model.name: {name} takes none of {', '.join(names)}; write a wrapper, such as\n"
                f"  from {module} import {attribute}\n"
                f"  def model(num_classes, in_channels, **args):\n"
                f"      return {attribute}(..., **args)"
            )
        words[word] = number
    return words


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
