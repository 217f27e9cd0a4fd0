"""Exporting a trained model to a file that runs without this project: torch.export, ONNX, weights.

Before a file is written, its content is loaded again and compared with the model.

An exported file contains no paths, and nothing about the computer or the user. The same checkpoint
always gives the same bytes.
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
from cnn.datasets.preprocessing import Normalize, Preprocessing
from cnn.errors import Failed, Refused, first_line
from cnn.inference.evaluation import set_decoding
from cnn.inference.trained_model import TrainedModel
from cnn.models.build import build_model
from cnn.utils.checked_zip import write_archive

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 17)  # with which the exported model is checked
TOLERANCE = 1e-4  # largest difference of a logit, relative to the largest logit if above 1
NORMALIZED_INSIDE = "in 0..1; mean and std are applied inside"
# For the metadata: the side that is resized, by `Preprocessing.fit`, and scaled decoding.
SIDES = {"crop": "the shorter side", "pad": "the longer side", "stretch": "each side"}
SCALED = "JPEG in full, or at {} pixels or more (shorter side): photographs 0.4 of 255 levels apart"
DIVIDED = "after a division by temperature"
METADATA = "metadata.json"  # the name of the metadata within a .pt2 file
SHAPES = {"images": {0: torch.export.Dim("batch", min=1)}}  # any batch size
SEED = 2**62 + 1  # for initial weights that differ from those of the training
GRAPHS_ONLY = "its forward must not branch on values; --format weights exports any model"
TORCH_OPSET = 18  # the lowest opset that torch.onnx can write; onnx converts to lower ones
ONNX = {"dynamo": True, "verbose": False, "output_names": ["logits"], "dynamic_shapes": SHAPES}

# Takes pixels in 0..1 (N, C, H, W), returns logits (N, classes).
Inference = Callable[[torch.Tensor], torch.Tensor]


class Deployed(nn.Module):
    """A model that takes pixels from 0 to 1 and normalizes the pixels itself.

    Args:
        model: a network for normalized images (N, C, H, W). The network returns logits (N,
            classes).
        preprocessing: contains the mean and the standard deviation of each channel.
        temperature: divides the logits.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W; in 0..1
        """Computes the logits of images.

        Args:
            images: the images (N, C, H, W), with pixels from 0 to 1.

        Returns:
            The logits (N, classes).
        """
        return self.model((images - self.mean) / self.std) / self.temperature


def export_model(trained: TrainedModel, file_format: str, opset: int | None) -> tuple[bytes, str]:
    """Exports a model, and checks that the exported model computes the same logits.

    Args:
        trained: a model on the CPU.
        file_format: "torch", "onnx" or "weights".
        opset: the version of ONNX's operators, such as 17; None for the default of torch.onnx and
            for any other format.

    Returns:
        Two values: the content of the file to write, and a text with the result of the check.

    Raises:
        Refused: torch cannot export the model.
        Failed: a logit of the exported model differs too much from the logit of the original model.
            A difference of 1e-4 is permitted. If the largest logit is above 1, a difference of 1e-4
            times the largest logit is permitted.
    """
    export, load = FORMATS[file_format]
    trained.model.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        content = export(trained, opset) if opset else export(trained)
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

    The exported model takes pixels from 0 to 1. The .pt2 file contains a JSON file metadata.json,
    which describes the input, the output and the classes.

    torch.export notes the origin of each operation, with the paths of Python files. These notes are
    removed, except the names of the modules.

    Args:
        trained: a model on the CPU.

    Returns:
        The content of the .pt2 file.
    """
    program = _program(trained)
    for module in program.graph_module.modules():  # the graphs of branches are modules within it
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            modules = node.meta.get("nn_module_stack", {})  # torch.export.unflatten needs the names
            node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
            node.meta["nn_module_stack"] = {key: (path, "") for key, (path, _) in modules.items()}
    buffer = io.BytesIO()
    text = json.dumps(metadata(trained), ensure_ascii=False, indent=1)
    torch.export.save(program, buffer, extra_files={METADATA: text})
    return buffer.getvalue()


def from_torch(content: bytes) -> Inference:
    """Returns a function that runs the model in a .pt2 file of torch.export.

    The function takes images (N, C, H, W) with pixels from 0 to 1. The function returns logits (N,
    classes).

    Args:
        content: the bytes of the .pt2 file.
    """
    return torch.export.load(io.BytesIO(content)).module()


def to_onnx(trained: TrainedModel, opset: int | None = None) -> bytes:
    """Exports a model to the ONNX format.

    The exported model takes pixels from 0 to 1. The properties of the ONNX file describe the input,
    the output and the classes. A property that is not a text, such as the list of classes, is
    stored as JSON.

    Args:
        trained: a model on the CPU.
        opset: the version of the operators, such as 17; None for the default of torch.onnx.

    Returns:
        The content of the ONNX file.

    Raises:
        Refused: torch.onnx cannot export the model, or the model cannot be converted to the opset.
    """
    import onnx

    fault, advice = f"model.name: torch.onnx cannot export {trained.cfg.model.name}", GRAPHS_ONLY
    if opset:
        fault, advice = f"{fault} with opset {opset}", "expected a higher opset, or none"
    program = _program(trained)
    with _refusing(fault, advice):
        version = opset and max(opset, TORCH_OPSET)
        proto = torch.onnx.export(program, opset_version=version, **ONNX).model_proto
        _remove_origins(proto)
        if opset:
            proto = _convert_opset(proto, opset)
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata(trained).items()
    }
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def from_onnx(content: bytes) -> Inference:
    """Returns a function that runs an ONNX model with onnxruntime on the CPU.

    The function takes images (N, C, H, W) with pixels from 0 to 1. The function returns logits (N,
    classes).

    Args:
        content: the bytes of the ONNX file.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_weights(trained: TrainedModel) -> bytes:
    """Returns the weights of a model as the content of a file for `torch.load`.

    The file contains a dict. The entry "model_state_dict" has the weights. Further entries describe
    the input, the output, the classes and the preprocessing.

    Args:
        trained: a model on the CPU.
    """
    content = metadata(trained, "(pixels in 0..1 - mean) / std")
    content |= {"temperature": trained.temperature, "output": f"{content['output']} {DIVIDED}"}
    buffer = io.BytesIO()
    write_archive({"model_state_dict": trained.model.state_dict()} | content, buffer)
    return buffer.getvalue()


def from_weights(content: bytes) -> Inference:
    """Builds a new model with the weights in a file that `to_weights` exported.

    The new model takes pixels from 0 to 1, and normalizes the pixels itself.

    Args:
        content: the bytes of the file.
    """
    saved = torch.load(io.BytesIO(content), weights_only=True)
    cfg = ModelConfig(saved["model"], saved["model_args"])
    pre = Preprocessing(**saved["preprocessing"])
    model, _ = build_model(cfg, saved["classes"], pre.channels, pre.image_size, SEED)
    model.load_state_dict(saved["model_state_dict"])
    return Deployed(model.eval(), pre, saved["temperature"])


FORMATS: dict[str, tuple[Callable[[TrainedModel], bytes], Callable[[bytes], Inference]]] = {
    "torch": (to_torch, from_torch),
    "onnx": (to_onnx, from_onnx),
    "weights": (to_weights, from_weights),
}


def _program(trained: TrainedModel) -> torch.export.ExportedProgram:
    """Returns the graph that torch.export makes of a model and its normalization.

    The graph takes any number of images, with pixels from 0 to 1.

    Args:
        trained: a model on the CPU.

    Raises:
        Refused: torch.export cannot export the model.
    """
    pre = trained.preprocessing
    deployed = Deployed(trained.model, pre, trained.temperature).eval()
    example = torch.zeros(2, *pre.shape)
    with _refusing(f"model.name: torch.export cannot export {trained.cfg.model.name}", GRAPHS_ONLY):
        return torch.export.export(deployed, (example,), dynamic_shapes=SHAPES)


def _remove_origins(message: Any) -> None:
    """Removes the notes about the origin of each part of an ONNX model.

    torch.onnx notes the lines of Python code that an operation comes from, with their paths.

    Args:
        message: the ONNX model, or any protobuf message within the model. The message is changed in
            place.
    """
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _remove_origins(part)


def _convert_opset(proto: Any, opset: int) -> Any:
    """Converts an ONNX model to an opset, if torch.onnx has not written that opset.

    The version of the file format is lowered too, since a program that knows only an old opset
    knows only an old file format.

    Args:
        proto: the ONNX model, with an opset of at least `TORCH_OPSET`.
        opset: the version of the operators.

    Returns:
        The ONNX model with the opset.

    Raises:
        Exception: onnx cannot convert the model, or onnxruntime cannot load the result.
    """
    from onnx import helper, version_converter

    if opset < TORCH_OPSET:
        for node in proto.graph.node:  # onnx keeps an attribute that is unknown before opset 18
            for item in [a for a in node.attribute if a.name == "noop_with_empty_axes" and not a.i]:
                node.attribute.remove(item)
        proto = version_converter.convert_version(proto, opset)
    operators = helper.make_opsetid("", opset)
    if operators not in proto.opset_import:  # torch.onnx writes another one, and only warns
        raise Refused("torch.onnx has written another opset")
    proto.ir_version = min(proto.ir_version, helper.find_min_ir_version_for([operators]))
    from_onnx(proto.SerializeToString())
    return proto


@contextlib.contextmanager
def _refusing(fault: str, advice: str) -> Iterator[None]:
    """Turns any exception in a `with` block into a Refused exception.

    Between the fault and the advice, the message of the new exception gives the reason.

    Args:
        fault: the beginning of the message, with the place, such as "model.name: cannot export it".
        advice: the end of the message.

    Raises:
        Refused: the block has raised an exception.
    """
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None:  # torch wraps the reason in advice to its developers
            error = error.__cause__
        reason = first_line(error).rpartition("Assertion `false` failed: ")[2]  # of onnx, in C++
        raise Refused(f"{fault}: {reason}; {advice}") from error


# -- metadata and check ------------------------------------------------------------------------


def metadata(trained: TrainedModel, pixels: str = NORMALIZED_INSIDE) -> dict[str, Any]:
    """Returns the description of an exported file, for programs that use the file.

    Args:
        trained: the exported model.
        pixels: a text about the range of the input, such as "in 0..1".

    Returns:
        A dict with entries such as "input", "output", "classes" and "preprocessing". The values are
        texts, numbers, lists and dicts.
    """
    pre, content = trained.preprocessing, trained.content
    shape = f"{pre.channels}, {pre.image_size}, {pre.image_size}"
    return {
        "input": f"images: float32 (N, {shape}), {pixels}",
        "output": f"logits: float32 (N, {len(trained.classes)}); softmax makes them probabilities",
        "classes": list(trained.classes),
        **({"positive": trained.classes[1]} if len(trained.classes) == 2 else {}),
        **({"threshold": trained.threshold} if trained.threshold is not None else {}),
        "preprocessing": asdict(pre),
        "colors": {1: "gray", 3: "RGB"}.get(pre.channels, "as the data have them"),
        "decoding": SCALED.format(pre.form.least_side) if pre.scaled else "in full",
        "resize": f"{SIDES[pre.fit]} to {pre.image_size} pixels, bilinear with antialiasing",
        "crop": f"the middle {pre.image_size} x {pre.image_size} pixels; black outside the picture",
        "model": trained.cfg.model.name,
        "model_args": dict(trained.cfg.model.args),
        "epoch": content["epoch"],
        "started": content["started"],
        "torch": str(torch.__version__),
    }


def sample_images(trained: TrainedModel) -> tuple[torch.Tensor, str]:
    """Returns 17 images for the check of an exported model.

    The images are validation images. If there are fewer than 17 validation images, some are
    repeated. If the data cannot be read, the images are random numbers.

    Args:
        trained: the exported model. The settings of the model name the data.

    Returns:
        Two values. The first is a tensor (17, C, size, size) of the images, uint8 or float from 0
        to 1. Here, size is the height and width of the model's input. The second is a text about
        the images, such as "17 validation images".
    """
    pre, number = trained.preprocessing, max(BATCH_SIZES)
    try:
        val = build_data(replace(trained.cfg.data, download=False), trained.cfg.seed, pre).val
        set_decoding(trained, val)
        indices = range(min(number, len(val)))
        images = torch.stack([val.picture(index, pre.form) for index in indices])
        return images[torch.arange(number) % len(images)], f"{len(images)} validation images"
    except Exception as error:  # noqa: BLE001  the user's own dataset may raise anything
        logger.info("the images of the training are not available here (%s)", first_line(error))
    generator, shape = torch.Generator().manual_seed(0), (number, *pre.shape)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return images, "random images"


def compare_logits(
    trained: TrainedModel, inference: Inference, images: torch.Tensor
) -> tuple[float, float]:
    """Compares the logits of an exported model with the logits of the original model.

    Each model computes a batch of 1 image and a batch of 17 images.

    Args:
        trained: the original model.
        inference: the exported model, which takes pixels from 0 to 1.
        images: images (17, C, H, W), uint8 or float from 0 to 1, not normalized.

    Returns:
        Two numbers. The first is the largest absolute difference between the two models' logits.
        The second is the largest absolute value of a logit of the original model.
    """
    normalize = Normalize(trained.preprocessing, trained.device)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    expected = torch.cat([trained.model(normalize(images[-size:])) for size in BATCH_SIZES])
    expected = expected / trained.temperature
    logits = torch.cat([inference(pixels[-size:].contiguous()) for size in BATCH_SIZES])
    return (logits - expected).abs().max().item(), expected.abs().max().item()
