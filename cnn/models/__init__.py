"""What models there are: a table of names, and the way from a name to a model."""

import logging
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from cnn.config import ModelConfig, Refused, is_import_path
from cnn.models import torchvision_models
from cnn.models.lenet5 import LeNet5
from cnn.models.resnet import ResNet9, ResNet20
from cnn.models.simple_cnn import SimpleCNN
from cnn.utils import seeding
from cnn.utils.archive import read_archive
from cnn.utils.importing import import_object

logger = logging.getLogger(__name__)

MODELS = {"simple_cnn": SimpleCNN, "lenet5": LeNet5, "resnet9": ResNet9, "resnet20": ResNet20}


def build_model(
    cfg: ModelConfig, num_classes: int, in_channels: int, image_size: int, seed: int
) -> nn.Module:
    """Builds the model on the CPU, its first weights a function of the seed.

    Raises:
        Refused: no such model, arguments it does not take, weights that do not fit, or images of
            a size that it cannot take.
    """
    seeding.seed_sample(seed, seeding.INIT)
    pretrained = cfg.pretrained and not cfg.weights
    if cfg.name in MODELS or is_import_path(cfg.name):
        make = MODELS.get(cfg.name) or import_object(cfg.name, "model.name")
        if pretrained:
            raise Refused(
                f"model.pretrained: only torchvision's models have weights, not {cfg.name}"
            )
        try:
            model = make(num_classes=num_classes, in_channels=in_channels, **cfg.args)
        except TypeError as error:
            raise Refused(f"model.args: {cfg.name}: {error}") from error
        except (ValueError, RuntimeError) as error:
            if cfg.name not in MODELS:
                raise  # the user's own code: its traceback is worth having
            raise Refused(f"model.args: {cfg.name}: {error}") from None
    else:
        model = torchvision_models.build(cfg.name, num_classes, in_channels, pretrained, cfg.args)
    if cfg.weights:
        _load_weights(model, Path(cfg.weights))
    _try_out(model, cfg.name, num_classes, (in_channels, image_size, image_size))
    return model


def _try_out(model: nn.Module, name: str, num_classes: int, shape: tuple[int, ...]) -> None:
    """Sends two empty images through, so that what does not fit is told before the first epoch."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        raise Refused(
            f"model.name: {name} cannot take images of {size} ({str(error).splitlines()[0]});"
            f" a larger data.image_size may help"
        ) from error
    finally:
        model.train(training)
    got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if got != (2, num_classes):
        raise Refused(f"model.name: {name}: expected logits of shape (2, {num_classes}), got {got}")


def _load_weights(model: nn.Module, path: Path) -> None:
    """Begins from the weights of a file: a checkpoint of ours or a state dict."""
    try:
        if not path.is_file() or is_zipfile(path):
            state = read_archive(path)
        else:  # the format of before torch 1.6, which has no checksums
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Refused as refusal:
        raise Refused(f"model.weights: {refusal}") from None
    except Exception as error:  # noqa: BLE001  whatever a strange file makes torch say
        raise Refused(
            f"model.weights: {path}: not a file of torch.save, or a damaged one"
            f" ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise Refused(
            f"model.weights: {path}: expected weights by name, got {type(state).__name__}"
        )
    state = state.get("ema_state_dict") or state.get("model_state_dict", state)
    state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    spoiled = [k for k, v in state.items() if v.is_floating_point() and v.isnan().any()]
    if spoiled:
        raise Refused(f"model.weights: {path}: {spoiled[0]} holds values that are no numbers (NaN)")
    left = torchvision_models.load_matching(model, state)
    parameters = {name for name, _ in model.named_parameters()}
    missing = [name for name in left if name in parameters]
    if len(missing) == len(parameters):
        raise Refused(f"model.weights: no tensor in {path} fits the model")
    logger.info("weights from %s; new: %s", path, ", ".join(missing) or "nothing")
