"""torchvision's classification models, adapted to the number of classes and of image channels."""

from typing import Any
from urllib.error import URLError

from torch import nn

from cnn.config.settings import MODEL_FORMS, MODEL_NAMES
from cnn.config.values import suggest
from cnn.errors import Refused
from cnn.models.weights import Tensors, adapt_first_convolution

AUXILIARY_HEADS = ("googlenet", "inception_v3")  # these return several outputs by default


def build(name: str, num_classes: int, in_channels: int, args: dict[str, Any]) -> nn.Module:
    """Builds a classification model of torchvision on the CPU.

    Args:
        name: torchvision's name of the model, such as "resnet18".
        num_classes: number of logits per image.
        in_channels: number of image channels.
        args: further keyword arguments for torchvision's model.

    Raises:
        Refused: there is no such model, or the model does not take the arguments in `args`.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        hint = suggest(name, [*MODEL_NAMES, *known])
        raise Refused(f"model.name: expected {MODEL_FORMS}; got {name}{hint}")
    if name in AUXILIARY_HEADS:
        args = {"aux_logits": False, "init_weights": True} | args
    try:
        model = models.get_model(name, weights=None, num_classes=num_classes, **args)
    except (TypeError, ValueError) as error:
        raise Refused(f"model.args: {name}: {error}") from None
    adapt_first_convolution(model, in_channels)
    return model


def fetch(name: str) -> Tensors:
    """Returns torchvision's best weights of a model, which are downloaded once.

    Args:
        name: torchvision's name of the model, such as "resnet18".

    Raises:
        Refused: there is no such model, or the weights cannot be downloaded.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        return {}  # `build` says that there is no such model
    weights = models.get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        file = weights.url.rsplit("/", 1)[-1]
        fault = f"cannot fetch the weights of {name} ({error}); without internet, fetch"
        advice = f"{weights.url} elsewhere, copy the file here, and set model.weights={file}"
        raise Refused(f"model.pretrained: {fault} {advice}") from None
