"""The models of the package timm, adapted to the number of classes and of image channels."""

import difflib
from typing import Any

from torch import nn

from cnn.errors import Refused, first_line
from cnn.models.weights import Tensors

PREFIX = "timm:"  # before timm's name of a model


def build(name: str, num_classes: int, in_channels: int, args: dict[str, Any]) -> nn.Module:
    """Builds a model of timm on the CPU.

    Args:
        name: "timm:" and timm's name of the model, such as "timm:resnet18".
        num_classes: number of logits per image.
        in_channels: number of image channels.
        args: further keyword arguments for the model.

    Raises:
        Refused: timm is not installed, there is no such model, or the model does not take the
            arguments in `args`.
    """
    words = {"num_classes": num_classes, "in_chans": in_channels}
    return _create(name, "model.args", words | args)


def fetch(name: str, args: dict[str, Any]) -> Tensors:
    """Returns timm's weights of a model, which are downloaded once.

    Args:
        name: "timm:" and timm's name of the model.
        args: further keyword arguments for the model.

    Raises:
        Refused: timm is not installed, there is no such model, or the weights cannot be downloaded.
    """
    return _create(name, "model.pretrained", {"pretrained": True} | args).state_dict()


def _create(name: str, key: str, words: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise Refused(f"model.name: {name} needs a package: pip install timm") from None
    own = name.removeprefix(PREFIX)
    if not timm.is_model(own):
        near = difflib.get_close_matches(own.partition(".")[0], timm.list_models(), 5)
        advice = f"; did you mean one of {', '.join(near)}?" if near else ""
        raise Refused(f"model.name: timm has no model {own!r}{advice}")
    try:
        return timm.create_model(own, **words)
    except Exception as error:  # noqa: BLE001  a model, or a download, can raise anything
        reason = f"{key}: {name}: {first_line(error)}"
        if key == "model.pretrained":
            reason += "; without a download: model.pretrained=false, or a file: model.weights=FILE"
        raise Refused(reason) from None
