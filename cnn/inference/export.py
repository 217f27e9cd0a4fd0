"""A trained model as a file that runs without this project: torch.export, ONNX, or weights alone.

No file is written before what is in it has been loaded again and has given the answers that the
model gives here.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from cnn.datasets.build import build_data
from cnn.datasets.images import FileImages
from cnn.datasets.preprocessing import Normalize, Preprocessing, resize_and_crop
from cnn.errors import Failed, Refused
from cnn.inference.trained_model import TrainedModel
from cnn.models.build import build_model
from cnn.utils.checked_zip import write_archive

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
BATCHES = (1, 17)  # images at once, to check that any number goes
TOLERANCE = 1e-4  # of a logit, or of the largest one where that is above 1
METADATA = "metadata.json"  # name within a file of torch.export

Answer = Callable[
    [torch.Tensor], torch.Tensor
]  # pixels in 0..1 (N, C, H, W) to logits (N, classes)


class Deployed(nn.Module):
    """The model with its normalisation, which nobody can forget then.

    Args:
        model: takes normalised images.
        preprocessing: with the mean and std of them.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W; in 0..1
        return self.model((images - self.mean) / self.std)  # N, num_classes


def export(trained: TrainedModel, form: str) -> tuple[bytes, str]:
    """The model as the content of a file, and how it was checked.

    Args:
        trained: on the CPU.
        form: of FORMATS.

    Raises:
        Refused: the model is one that torch cannot export.
        Failed: what comes out gives other answers.
    """
    make, load = FORMATS[form]
    trained.model.to(memory_format=torch.contiguous_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its own behalf
        data = make(trained)
        images, which = some_images(trained)
        difference, largest = compare(trained, load(trained, data), images)
    said = f"largest difference from PyTorch {difference:.2g}, logits up to {largest:.3g}"
    if not difference <= TOLERANCE * max(1.0, largest):
        raise Failed(f"the exported model does not agree on {which}: {said}; nothing was written")
    batches = " and ".join(map(str, BATCHES))
    return data, f"checked on {which}, {batches} at once: {said}"


# -- the formats: to bytes, and from bytes to answers ------------------------------------------


def to_torch(trained: TrainedModel) -> bytes:
    buffer = io.BytesIO()
    text = json.dumps(metadata(trained), ensure_ascii=False, indent=1)
    torch.export.save(_program(trained), buffer, extra_files={METADATA: text})
    return buffer.getvalue()


def from_torch(trained: TrainedModel, data: bytes) -> Answer:
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(trained: TrainedModel) -> bytes:
    import onnx

    program = _program(trained).run_decompositions({MAX_POOL: _largest})
    names = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, dynamic_shapes={"images": {0: "batch"}}, **names
        )
    except Exception as error:
        raise _cannot(trained, "torch.onnx", error) from error
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata(trained).items()
    }
    proto = made.model_proto  # made anew each time it is asked for
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def from_onnx(trained: TrainedModel, data: bytes) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def to_weights(trained: TrainedModel) -> bytes:
    buffer = io.BytesIO()
    weights = {"model_state_dict": trained.model.state_dict()}
    write_archive(weights | metadata(trained, normalizes=False), buffer)
    return buffer.getvalue()


def from_weights(trained: TrainedModel, data: bytes) -> Answer:
    saved = torch.load(io.BytesIO(data), weights_only=True)
    cfg, pre = replace(trained.cfg.model, pretrained=False, weights=None), trained.preprocessing
    another = trained.cfg.seed + 1  # other first weights than the trained model began with
    model = build_model(cfg, len(saved["classes"]), pre.channels, pre.image_size, another)
    model.load_state_dict(saved["model_state_dict"])
    return Deployed(model.eval(), Preprocessing(**saved["preprocessing"]))


FORMATS: dict[
    str, tuple[Callable[[TrainedModel], bytes], Callable[[TrainedModel, bytes], Answer]]
] = {
    "torch": (to_torch, from_torch),
    "onnx": (to_onnx, from_onnx),
    "weights": (to_weights, from_weights),
}


MAX_POOL = torch.ops.aten.adaptive_max_pool2d.default


def _largest(images: torch.Tensor, size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Max pooling to one pixel, (N, C, 1, 1), by what every torch.onnx knows; 2.11's has no other."""
    if list(size) != [1, 1]:
        return NotImplemented
    where = images.flatten(-2).argmax(-1)[..., None, None]
    return images.amax((-2, -1), keepdim=True), where


def _program(trained: TrainedModel) -> torch.export.ExportedProgram:
    """The model and its normalisation as a graph for any number of images."""
    pre = trained.preprocessing
    deployed = Deployed(trained.model, pre).eval()
    example = torch.zeros(2, pre.channels, pre.image_size, pre.image_size)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    try:
        return torch.export.export(deployed, (example,), dynamic_shapes=shapes)
    except Exception as error:
        raise _cannot(trained, "torch.export", error) from error


def _cannot(trained: TrainedModel, what: str, error: Exception) -> Refused:
    while error.__cause__ is not None:  # torch wraps the reason in advice to its developers
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Refused(
        f"model.name: {what} cannot take {trained.cfg.model.name}: {reason.rstrip('.')}. Its forward must"
        f" not branch on values or on the number of images; --format weights takes any model"
    )


# -- what a file says of itself ----------------------------------------------------------------


def metadata(trained: TrainedModel, normalizes: bool = True) -> dict[str, Any]:
    """What is needed to use the file, as plain values.

    Args:
        normalizes: whether mean and std are in the file's graph.
    """
    pre, content = trained.preprocessing, trained.content
    shape = f"{pre.channels}, {pre.image_size}, {pre.image_size}"
    inside = (
        "in 0..1; mean and std are applied inside"
        if normalizes
        else "(pixels in 0..1 - mean) / std"
    )
    return {
        "input": f"images: float32 (N, {shape}), {inside}",
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


# -- does it agree? ------------------------------------------------------------------------------


def some_images(trained: TrainedModel) -> tuple[torch.Tensor, str]:
    """Images as the data have them, in the model's size, (17, C, H, W); and which.

    Of the validation; random ones where the data are not there.
    """
    pre, number = trained.preprocessing, max(BATCHES)
    try:
        found = build_data(replace(trained.cfg.data, download=False), trained.cfg.seed).val
        if isinstance(found, FileImages):
            found.files.channels = pre.channels
        count = min(number, len(found))
        images = torch.stack(
            [resize_and_crop(found[index], pre.image_size) for index in range(count)]
        )
        if images.shape[1:] != (pre.channels, pre.image_size, pre.image_size):
            raise Refused(f"they are of {tuple(images.shape[1:])} now")
        which = f"{count} images of the validation"
        return images[torch.arange(number) % count], which
    except Exception as error:  # noqa: BLE001  whatever the user's own dataset makes of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.info("the images that it was trained on are not to be had here (%s)", reason)
    shape = (number, pre.channels, pre.image_size, pre.image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8), "random images"


def compare(trained: TrainedModel, answer: Answer, images: torch.Tensor) -> tuple[float, float]:
    """Holds the answers against those of the model and the normalisation that it was trained with.

    Returns:
        The largest difference of a logit, and the largest logit.
    """
    normalize = Normalize(trained.preprocessing, CPU)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    difference = largest = 0.0
    for number in BATCHES:
        expected = trained.model(normalize(images[-number:]))
        got = answer(pixels[-number:].contiguous())
        if got.shape != expected.shape or not got.isfinite().all():
            return float("inf"), expected.abs().max().item()
        difference = max(difference, (got - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return difference, largest
