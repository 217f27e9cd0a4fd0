"""Counts the memory that a training step needs at least, by model, precision and batch size.

    python bench/memory.py        under two minutes

Nothing is computed: fake tensors go through the model, and the bytes are counted that its backward
pass needs, with weights, gradients and momentum. A GPU needs more: CUDA itself, the workspace of
convolutions, the gradients of activations. AdamW needs 4 bytes more per parameter than SGD.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MODELS = ("resnet18", "resnet50", "efficientnet_lite0", "swin_t")
BATCHES = (16, 32, 64, 128)
SIZE = 224  # side of the images in pixels


def gigabytes(name: str, batch: int, bf16: bool) -> float:
    """Returns the memory of one training step in GB (10^9 bytes)."""
    from cnn.config.settings import ModelConfig
    from cnn.models.build import build_model

    model, _ = build_model(ModelConfig(name=name), list("abcdefghij"), 3, SIZE, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for names in (module._parameters, module._buffers):
                for key, tensor in names.items():
                    names[key] = None if tensor is None else mode.from_tensor(tensor)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        images = torch.rand(batch, 3, SIZE, SIZE)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            loss = model(images).sum()
        state = sum(p.numel() * p.element_size() for p in model.parameters())
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        del loss
    return (3 * state + sum(kept.values())) / 1e9


def main() -> None:
    from bench.common import table

    rows = [
        [f"{name}, {'bf16' if bf16 else 'fp32'}"]
        + [f"{gigabytes(name, batch, bf16):.1f}" for batch in BATCHES]
        for name in MODELS
        for bf16 in (False, True)
    ]
    print(table(["GB by batch size", *map(str, BATCHES)], rows))


if __name__ == "__main__":
    main()
