"""Exporting a trained model to a file that runs without this project: torch.export, ONNX, weights.

Before a file is written, its content is loaded again and compared with the model.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from cnn.config import ModelConfig
from cnn.datasets.build import build_data
from cnn.datasets.preprocessing import Normalize, Preprocessing, resize_and_crop
from cnn.errors import Failed, Refused
from cnn.inference.evaluation import set_channels
from cnn.inference.trained_model import TrainedModel
from cnn.models.build import build_model
from cnn.utils.checked_zip import write_archive

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 17)  # with which the exported model is checked
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit if above 1
NORMALIZED_INSIDE = "in 0..1; mean and std are applied inside"
METADATA = "metadata.json"  # its name within a file of torch.export
SHAPES = {"images": {0: torch.export.Dim("batch", min=1)}}  # any batch size
SEED = 2**62 + 1  # for initial weights that differ from those of the training

# Takes pixels in 0..1 (N, C, H, W), returns logits (N, classes).
Inference = Callable[[torch.Tensor], torch.Tensor]


class Deployed(nn.Module):
    """A model that contains its normalization, so that it takes pixels from 0 to 1.

    Args:
        model: takes normalized images (N, C, H, W) and returns logits (N, classes).
        preprocessing: contains the mean and standard deviation of every channel.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W; in 0..1
        """Computes the logits of images.

        Args:
            images: the images (N, C, H, W), with pixels from 0 to 1.

        Returns:
            The logits (N, classes).
        """
        return self.model((images - self.mean) / self.std)


def export_model(trained: TrainedModel, file_format: str) -> tuple[bytes, str]:
    """Exports a model, and checks that the exported model computes the same logits.

    Args:
        trained: a model on the CPU.
        file_format: "torch", "onnx" or "weights".

    Returns:
        The content of the file to write, and a text with the result of the check.

    Raises:
        Refused: torch cannot export the model.
        Failed: a logit of the exported model differs from the original one by more than the limit.
            The limit is 1e-4, or 1e-4 times the largest logit if that is above 1.
    """
    export, load = FORMATS[file_format]
    trained.model.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        content = export(trained)
        images, source = sample_images(trained)
        difference, largest = compare_logits(trained, load(content), images)
    result = f"largest difference from PyTorch {difference:.2g}, logits up to {largest:.3g}"
    if not difference <= TOLERANCE * max(1.0, largest):
        raise Failed(f"the exported model disagrees on {source}: {result}; nothing was written")
    batches = " and ".join(map(str, BATCH_SIZES))
    return content, f"checked on {source} in batches of {batches}: {result}"


# -- the formats: exporting and loading --------------------------------------------------------


def to_torch(trained: TrainedModel) -> bytes:
    """Exports a model to the .pt2 format of torch.export.

    The exported model takes pixels from 0 to 1. The result of the function `metadata` is stored in
    the file as JSON, under the name metadata.json.

    Args:
        trained: a model on the CPU.

    Returns:
        The content of the .pt2 file.
    """
    buffer = io.BytesIO()
    text = json.dumps(metadata(trained), ensure_ascii=False, indent=1)
    torch.export.save(_program(trained), buffer, extra_files={METADATA: text})
    return buffer.getvalue()


def from_torch(content: bytes) -> Inference:
    """Returns a function that runs the model in a .pt2 file of torch.export.

    The function takes images (N, C, H, W), with pixels from 0 to 1, and returns logits (N,
    classes).

    Args:
        content: the bytes of the file.
    """
    return torch.export.load(io.BytesIO(content)).module()


def to_onnx(trained: TrainedModel) -> bytes:
    """Exports a model to the ONNX format.

    The exported model takes pixels from 0 to 1. The entries that the function `metadata` returns
    are stored in the properties of the file. Since a property is text, an entry that is not text is
    stored as JSON.

    Args:
        trained: a model on the CPU.

    Returns:
        The content of the ONNX file.
    """
    import onnx

    program = _program(trained).run_decompositions({MAX_POOL: _max_pool_to_one})
    with _refusing(trained, "torch.onnx"):
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, output_names=["logits"], dynamic_shapes=SHAPES
        )
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata(trained).items()
    }
    proto = exported.model_proto  # a property that builds a new object each time
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def from_onnx(content: bytes) -> Inference:
    """Returns a function that runs the model in an ONNX file with onnxruntime on the CPU.

    The function takes images (N, C, H, W), with pixels from 0 to 1, and returns logits (N,
    classes).

    Args:
        content: the bytes of the file.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_weights(trained: TrainedModel) -> bytes:
    """Exports the weights of a model to a file for `torch.load`.

    The file contains a dict with "model_state_dict" and the entries that the function `metadata`
    returns.

    Args:
        trained: a model on the CPU.

    Returns:
        The content of the file.
    """
    content = metadata(trained, "(pixels in 0..1 - mean) / std")
    buffer = io.BytesIO()
    write_archive({"model_state_dict": trained.model.state_dict()} | content, buffer)
    return buffer.getvalue()


def from_weights(content: bytes) -> Inference:
    """Builds a new model with the weights in a file that `to_weights` exported.

    Args:
        content: the bytes of the file.

    Returns:
        The model. It contains its normalization, so that it takes pixels from 0 to 1.
    """
    saved = torch.load(io.BytesIO(content), weights_only=True)
    cfg = ModelConfig(saved["model"], saved["model_args"])
    pre = Preprocessing(**saved["preprocessing"])
    model = build_model(cfg, len(saved["classes"]), pre.channels, pre.image_size, SEED)
    model.load_state_dict(saved["model_state_dict"])
    return Deployed(model.eval(), pre)


FORMATS: dict[str, tuple[Callable[[TrainedModel], bytes], Callable[[bytes], Inference]]] = {
    "torch": (to_torch, from_torch),
    "onnx": (to_onnx, from_onnx),
    "weights": (to_weights, from_weights),
}

MAX_POOL = torch.ops.aten.adaptive_max_pool2d.default


def _max_pool_to_one(images: torch.Tensor, size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes adaptive max pooling to one pixel with operators that torch.onnx can export.

    It takes the place of `adaptive_max_pool2d`, which torch.onnx in PyTorch 2.11 cannot export.

    Args:
        images: the input (N, C, H, W).
        size: the height and width of the output. Only [1, 1] is possible.

    Returns:
        The largest value of each channel, and its index from 0 to H * W - 1, both (N, C, 1, 1).
        NotImplemented if `size` is not [1, 1].
    """
    if list(size) != [1, 1]:
        return NotImplemented
    indices = images.flatten(-2).argmax(-1)[..., None, None]
    return images.amax((-2, -1), keepdim=True), indices


def _program(trained: TrainedModel) -> torch.export.ExportedProgram:
    """Returns the graph that torch.export makes of a model together with its normalization.

    The graph takes batches of any number of images, with pixels from 0 to 1.

    Args:
        trained: a model on the CPU.

    Raises:
        Refused: torch.export cannot export the model.
    """
    pre = trained.preprocessing
    deployed = Deployed(trained.model, pre).eval()
    example = torch.zeros(2, *pre.shape)
    with _refusing(trained, "torch.export"):
        return torch.export.export(deployed, (example,), dynamic_shapes=SHAPES)


@contextlib.contextmanager
def _refusing(trained: TrainedModel, exporter: str) -> Iterator[None]:
    """Turns any exception in a `with` block into the exception Refused with a short reason.

    Args:
        trained: the model that the block exports. The message contains the name of the model.
        exporter: the part of torch that the block calls, such as "torch.onnx". The message contains
            it.

    Raises:
        Refused: the block has raised an exception.
    """
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None:  # torch wraps the reason in advice to its developers
            error = error.__cause__
        raise Refused(
            f"model.name: {exporter} cannot export {trained.cfg.model.name}: {_first_line(error)};"
            " its forward must not branch on values; --format weights exports any model"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- metadata and check ------------------------------------------------------------------------


def metadata(trained: TrainedModel, pixels: str = NORMALIZED_INSIDE) -> dict[str, Any]:
    """Returns what a program has to know to use an exported file.

    Args:
        trained: the exported model.
        pixels: a text that says how the numbers in the input are computed from pixels.

    Returns:
        A dict of texts, numbers, lists and dicts, with keys such as "input", "output", "classes"
        and "preprocessing".
    """
    pre, content = trained.preprocessing, trained.content
    shape = f"{pre.channels}, {pre.image_size}, {pre.image_size}"
    return {
        "input": f"images: float32 (N, {shape}), {pixels}",
        "output": f"logits: float32 (N, {len(trained.classes)}); softmax makes them probabilities",
        "classes": list(trained.classes),
        "preprocessing": asdict(pre),
        "colors": {1: "gray", 3: "RGB"}.get(pre.channels, "as the data have them"),
        "resize": f"the shorter side to {pre.image_size} pixels, bilinear with antialiasing",
        "crop": f"the middle {pre.image_size} x {pre.image_size} pixels",
        "model": trained.cfg.model.name,
        "model_args": dict(trained.cfg.model.args),
        "epoch": content["epoch"],
        "started": content["started"],
        "torch": str(torch.__version__),
    }


def sample_images(trained: TrainedModel) -> tuple[torch.Tensor, str]:
    """Returns 17 images with which an exported model is checked, and a text that describes them.

    The images are validation images. If there are fewer than 17, some of them are repeated. If the
    data cannot be read, the images are random numbers.

    Args:
        trained: the exported model. Its settings name the data.

    Returns:
        The images (17, C, size, size) in the size of the model's input, uint8 or float from 0 to 1;
        and a text such as "17 validation images".
    """
    pre, number = trained.preprocessing, max(BATCH_SIZES)
    try:
        val = build_data(replace(trained.cfg.data, download=False), trained.cfg.seed).val
        set_channels(trained, val)
        indices = range(min(number, len(val)))
        images = torch.stack([resize_and_crop(val[index], pre.image_size) for index in indices])
        return images[torch.arange(number) % len(images)], f"{len(images)} validation images"
    except Exception as error:  # noqa: BLE001  the user's own dataset may raise anything
        logger.info("the images of the training are not available here (%s)", _first_line(error))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        256, (number, *pre.shape), generator=generator, dtype=torch.uint8
    ), "random images"


def compare_logits(
    trained: TrainedModel, inference: Inference, images: torch.Tensor
) -> tuple[float, float]:
    """Compares the logits of an exported model with those of the original model.

    Each model computes a batch of 1 image and a batch of 17 images.

    Args:
        trained: the original model.
        inference: the exported model, which takes pixels from 0 to 1.
        images: images (17, C, H, W), uint8 or float from 0 to 1, not normalized.

    Returns:
        Two numbers. The first is the largest difference between a logit of the exported model and
        the same logit of the original model. The second is the largest absolute value of a logit of
        the original model.
    """
    normalize = Normalize(trained.preprocessing, trained.device)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    expected = torch.cat([trained.model(normalize(images[-size:])) for size in BATCH_SIZES])
    logits = torch.cat([inference(pixels[-size:].contiguous()) for size in BATCH_SIZES])
    return (logits - expected).abs().max().item(), expected.abs().max().item()
