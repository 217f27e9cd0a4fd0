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

BATCH_SIZES = (1, 17)  # that the exported model is checked with
TOLERANCE = 1e-4  # of a logit, times the largest logit where that is above 1
NORMALIZED_INSIDE = "in 0..1; mean and std are applied inside"
METADATA = "metadata.json"  # its name within a file of torch.export
SHAPES = {"images": {0: torch.export.Dim("batch", min=1)}}  # any batch size
SEED = 2**62 + 1  # for initial weights that differ from those of the training

# Takes pixels in 0..1 (N, C, H, W), returns logits (N, classes).
Inference = Callable[[torch.Tensor], torch.Tensor]


class Deployed(nn.Module):
    """A model with its normalization, which nobody can forget then.

    Args:
        model: takes normalized images.
        preprocessing: contains their mean and standard deviation.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W; in 0..1
        """Returns logits (N, classes)."""
        return self.model((images - self.mean) / self.std)


def export_model(trained: TrainedModel, file_format: str) -> tuple[bytes, str]:
    """Exports a model, and checks the result on some images.

    Args:
        trained: a model on the CPU.
        file_format: a key of FORMATS.

    Returns:
        The content of the file, and a sentence about the check.

    Raises:
        Refused: torch cannot export the model.
        Failed: the logits of the exported model differ.
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
    """Exports to the .pt2 format of torch.export."""
    buffer = io.BytesIO()
    text = json.dumps(metadata(trained), ensure_ascii=False, indent=1)
    torch.export.save(_program(trained), buffer, extra_files={METADATA: text})
    return buffer.getvalue()


def from_torch(content: bytes) -> Inference:
    """Loads the .pt2 format."""
    return torch.export.load(io.BytesIO(content)).module()


def to_onnx(trained: TrainedModel) -> bytes:
    """Exports to ONNX; the metadata is in the model's properties, as JSON."""
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
    """Loads ONNX in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_weights(trained: TrainedModel) -> bytes:
    """Exports the weights and the metadata as a file for `torch.load`."""
    content = metadata(trained, "(pixels in 0..1 - mean) / std")
    buffer = io.BytesIO()
    write_archive({"model_state_dict": trained.model.state_dict()} | content, buffer)
    return buffer.getvalue()


def from_weights(content: bytes) -> Inference:
    """Loads the weights into a new model."""
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
    """Decomposes max pooling to (N, C, 1, 1), which torch.onnx 2.11 cannot export."""
    if list(size) != [1, 1]:
        return NotImplemented
    indices = images.flatten(-2).argmax(-1)[..., None, None]
    return images.amax((-2, -1), keepdim=True), indices


def _program(trained: TrainedModel) -> torch.export.ExportedProgram:
    """Returns the graph of the model and its normalization for any batch size."""
    pre = trained.preprocessing
    deployed = Deployed(trained.model, pre).eval()
    example = torch.zeros(2, *pre.shape)
    with _refusing(trained, "torch.export"):
        return torch.export.export(deployed, (example,), dynamic_shapes=SHAPES)


@contextlib.contextmanager
def _refusing(trained: TrainedModel, exporter: str) -> Iterator[None]:
    """Turns any error of an exporter of torch into a refusal."""
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
    """Returns what is needed to use the file, as plain values.

    Args:
        trained: the exported model.
        pixels: how the input is computed from pixels.
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
    """Returns 17 validation images, or random ones if the data is not there, and what they are.

    The images (17, C, H, W) have the size of the model's input.
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
    """Compares the exported model with the model and the normalization of the training.

    Returns:
        The largest difference of a logit, and the largest logit.
    """
    normalize = Normalize(trained.preprocessing, trained.device)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    expected = torch.cat([trained.model(normalize(images[-size:])) for size in BATCH_SIZES])
    logits = torch.cat([inference(pixels[-size:].contiguous()) for size in BATCH_SIZES])
    return (logits - expected).abs().max().item(), expected.abs().max().item()
