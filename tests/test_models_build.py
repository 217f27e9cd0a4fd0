"""Models: shapes, sizes, first weights, weights from a file, and what is refused."""

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from cnn.config import ModelConfig
from cnn.errors import Refused
from cnn.models.build import MODELS, build_model
from cnn.models.simple_cnn import pool_relu
from cnn.models.weights import adapt_first_convolution

NATURAL = {"simple_cnn": (8, 28), "lenet5": (28, 32), "resnet9": (16, 32), "resnet20": (28, 32)}
NATURAL |= {"efficientnet_lite0": (32, 33)}


def build(name="simple_cnn", classes=4, channels=1, size=8, seed=0, **settings):
    """A model of so many classes, or of the classes of these names."""
    names = list(map(str, range(classes))) if isinstance(classes, int) else list(classes)
    return build_model(ModelConfig(name, **settings), names, channels, size, seed)[0]


def refusal(name="simple_cnn", **settings):
    with pytest.raises(Refused) as caught:
        build(name, **settings)
    return str(caught.value)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def same_weights(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_ours_gives_a_number_a_class(name, channels):
    for size in NATURAL[name]:
        model = build(name, 7, channels, size)
        logits = model(torch.randn(2, channels, size, size + 4))
        assert logits.shape == (2, 7) and logits.isfinite().all()
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, args, channels, expected",
    [
        ("resnet20", {}, 3, 269_722),  # 0.27 M; He et al. (2016), table 6
        ("resnet20", {"blocks": 9}, 3, 853_018),  # ResNet-56, 0.85 M; the same table
        ("resnet9", {}, 3, 6_573_120),  # Page (2018): 6.57 M
        ("lenet5", {}, 1, 61_706),  # LeCun et al. (1998) have 60,000: C3 is not fully connected
        ("simple_cnn", {"width": 8}, 1, 6_274),
        ("efficientnet_lite0", {}, 3, 3_383_818),  # 4.65 M with 1000 classes; its repository
    ],
)
def test_a_model_has_as_many_parameters_as_its_source(name, args, channels, expected):
    assert num_parameters(build(name, 10, channels, 32, args=args)) == expected


def test_the_residual_networks_halve_the_image_and_double_the_channels():
    images = torch.randn(2, 3, 32, 32)
    resnet20, resnet9 = build("resnet20", 10, 3, 32), build("resnet9", 10, 3, 32)
    assert resnet20.stages(resnet20.stem(images)).shape == (2, 64, 8, 8)
    features = resnet9.layer3(resnet9.layer2(resnet9.layer1(resnet9.stem(images))))
    assert features.shape == (2, 512, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_before_the_relu_is_pooling_after_it_bit_for_bit(dtype):
    images = torch.randn(3, 4, 6, 6).mul(2).round().to(dtype)  # many are alike, many 0
    found = []
    for layer in (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), pool_relu()):
        leaf = images.clone().requires_grad_()
        out = layer(leaf)
        out.backward(torch.arange(out.numel(), dtype=dtype).view_as(out))
        found.append((out, leaf.grad))
    assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resnet9_pools_as_adaptive_max_pooling_does_bit_for_bit(dtype):
    model = build("resnet9", 10, 3, 32, args={"width": 8}).to(dtype)
    features = torch.randn(5, 64, 4, 4).relu().mul(2).round().to(dtype)  # many are alike
    model.layer3, found = nn.Identity(), []
    model.stem = model.layer1 = model.layer2 = nn.Identity()
    for pooled in (
        model,
        lambda x: model.classifier(nn.AdaptiveMaxPool2d(1)(x).flatten(1)) * 0.125,
    ):
        leaf = features.clone(memory_format=torch.channels_last).requires_grad_()
        out = pooled(leaf)
        out.backward(torch.arange(out.numel(), dtype=dtype).view_as(out))
        found.append((out, leaf.grad))
    assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])


@pytest.mark.parametrize("name", NATURAL)
def test_no_model_of_ours_has_a_layer_that_cuda_cannot_repeat(name):
    """Adaptive pooling has no repeatable backward pass there, but for the mean of a whole map."""
    size = NATURAL[name][0]  # lenet5 has such a layer for images that are not 28 x 28
    open_nodes, seen = [build(name, 4, 3, size)(torch.randn(2, 3, size, size)).grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "ConvolutionBackward0" in names
    assert not [found for found in names if "Adaptive" in found]


def test_a_torchvision_model_takes_gray_images_and_any_number_of_classes():
    model = build("resnet18", 5, 1, 32)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert model(torch.randn(2, 1, 40, 40)).shape == (2, 5)


def test_a_torchvision_model_with_further_heads_gives_one_number_a_class():
    assert build("googlenet", 5, 3, 32).training


def test_the_first_weights_are_a_function_of_the_seed():
    first, second = build(seed=1), build(seed=1)
    assert same_weights(first, second) and not same_weights(first, build(seed=2))
    torch.manual_seed(5)
    assert same_weights(first, build(seed=1)), "whatever was drawn before"


@pytest.mark.parametrize(
    "name, settings, parts",
    [
        ("resnet21", {}, ["model.name: expected simple_cnn", "got resnet21", "mean 'resnet20'?"]),
        ("resnet_18", {}, ["did you mean 'resnet18'?"]),
        ("simple_cnn", {"args": {"widht": 3}}, ["model.args: simple_cnn", "'widht'"]),
        ("simple_cnn", {"args": {"dropout": 1.5}}, ["model.args: simple_cnn", "1.5"]),
        ("resnet18", {"args": {"widht": 3}}, ["model.args: resnet18", "'widht'"]),
        ("simple_cnn", {"pretrained": True}, ["model.pretrained", "not simple_cnn"]),
        ("simple_cnn", {"size": 3}, ["cannot take images of 1x3x3", "data.image_size"]),
        ("lenet5", {"size": 4}, ["cannot take images of 1x4x4", "data.image_size"]),
        ("resnet9", {"size": 7}, ["cannot take images of 1x7x7", "data.image_size"]),
        ("alexnet", {"size": 32}, ["cannot take images of 1x32x32", "data.image_size"]),
        ("torch.nn:Conv3d", {}, ["model.name: torch.nn:Conv3d takes none of num_classes"]),
        ("no_such_module:Net", {}, ["model.name: expected package.module:name", "no module"]),
        ("torch.nn:Netz", {}, ["model.name: the module torch.nn", "has no 'Netz'"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(name, settings, parts):
    message = refusal(name, **settings)
    assert all(part in message for part in parts), message


OWN = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, num_classes, in_channels, size=8, extra=0):
        super().__init__()
        self.layer = nn.Linear(in_channels * size**2, num_classes + extra)
    def forward(self, images):
        return self.layer(images.flatten(1))

class Two(Linear):
    def forward(self, images):
        return super().forward(images), None

class Strict(Linear):
    def forward(self, images):
        assert images.shape[1] == 3
"""


def test_a_model_of_the_users_own_is_tried_out_before_it_is_taken(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model = build("my_net:Linear", args={"size": 8})
    assert model.layer.weight.shape == (4, 64)
    assert "expected logits of shape (2, 4), got (2, 5)" in refusal(
        "my_net:Linear", args={"extra": 1}
    )
    assert "got tuple" in refusal("my_net:Two")
    assert "cannot take images of 1x9x9" in refusal("my_net:Linear", size=9)
    said = refusal("my_net:Strict")
    assert "cannot take images of 1x8x8 (AssertionError); a larger" in said, "it gave no message"


def test_trying_out_leaves_the_model_in_training_and_its_statistics_alone():
    model = build("resnet20", size=32)
    assert all(module.training for module in model.modules())
    assert model.stem[1].num_batches_tracked == 0 and model.stem[1].running_mean.eq(0).all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model_state_dict": state, "ema_state_dict": None},
        lambda state: {"model_state_dict": {}, "ema_state_dict": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
    ids=["state dict", "checkpoint", "with averaged weights", "of many devices"],
)
def test_weights_of_a_file_are_taken_all_but_the_head_of_other_classes(wrap, tmp_path, caplog):
    source = build(classes=9, seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        model = build(seed=2, weights=str(tmp_path / "a.pth"))
    assert caplog.messages[-1].endswith("new: classifier.weight, classifier.bias")
    assert same_weights(model.features, source.features)
    assert same_weights(model.classifier, build(seed=2).classifier)


def test_weights_of_the_same_model_are_taken_whole(tmp_path, caplog):
    source = build(seed=1)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    with caplog.at_level(logging.INFO):
        assert same_weights(build(seed=2, weights=str(tmp_path / "a.pth")), source)
    assert caplog.messages[-1].endswith("a.pth: 20 of 20 tensors; new: nothing")


@pytest.mark.parametrize(
    "content, part",
    [
        (b"no weights", "not a file of torch.save"),
        (None, "no such file"),
        ({"a": torch.zeros(3)}, "no tensor in"),
        ({"epoch": 3}, "no tensor in"),
        (torch.zeros(3), "model.weights"),
        ([torch.zeros(3)], "model.weights"),
        ({"f": print}, "can run code"),  # code, which is not run
    ],
    ids=["text", "missing", "others", "numbers", "tensor", "list", "function"],
)
def test_a_file_without_weights_for_the_model_is_refused(content, part, tmp_path):
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = refusal(weights=str(path))
    assert part in message and str(path) in message


# -- weights of a file that names its classes ----------------------------------------------------


HEADS = """
import torch
from torch import nn

class Rows(nn.Module):
    def __init__(self, num_classes, in_channels, kind="linear"):
        super().__init__()
        self.body, self.kind = nn.Conv2d(in_channels, 4, 3), kind  # as many channels as classes
        if kind == "no bias":
            self.head = nn.Linear(4, num_classes, bias=False)
        if kind == "convolution":
            self.head = nn.Conv2d(4, num_classes, 1)
        if kind == "lazy":
            self.head = nn.LazyLinear(num_classes)
        if kind == "normalised":
            self.head = nn.Sequential(nn.Linear(4, num_classes), nn.BatchNorm1d(num_classes))
        if kind == "columns":
            self.head = nn.Parameter(torch.randn(4, num_classes))
        if kind == "padded":
            self.head = nn.Linear(4, -8 * (-num_classes // 8))
        if kind == "one a class":
            self.head = nn.ModuleList(nn.Linear(4, 1) for _ in range(num_classes))
        if kind == "bottleneck":
            self.head = nn.Sequential(nn.Linear(4, num_classes), nn.Linear(num_classes, num_classes))
        if kind == "one for few":
            self.head = nn.Linear(4, num_classes if num_classes > 4 else 1)
        if kind == "no fifth":
            self.head = nn.Linear(4, num_classes)
            assert num_classes < 5
        self.num_classes = num_classes
    def forward(self, images):
        features = self.body(images).mean((2, 3), keepdim=self.kind == "convolution")
        if self.kind == "columns":
            return features @ self.head
        if self.kind == "one a class":
            return torch.cat([head(features) for head in self.head], 1)
        return self.head(features).flatten(1)[:, :self.num_classes].expand(-1, self.num_classes)
"""
ROWS = ["no bias", "convolution", "lazy", "normalised"]
NO_ROWS = ["columns", "padded", "one a class", "bottleneck", "one for few", "no fifth"]


@pytest.fixture
def heads(folder_of_its_own):
    (folder_of_its_own / "heads.py").write_text(HEADS)


def logits_by_name(model, names, images):
    with torch.no_grad():
        return dict(zip(names, model.eval()(images).T, strict=True))


def save(model, names, **entries):
    torch.save({"model_state_dict": model.state_dict(), "classes": names} | entries, "a.pth")


@pytest.mark.parametrize(
    "now, said",
    [
        ("cbad", "new: nothing; classes kept: c, b, a, d; new: none; left out: none"),
        ("xabcdy", "new: nothing; classes kept: a, b, c, d; new: x, y; left out: none"),
        ("dba", "new: nothing; classes kept: d, b, a; new: none; left out: c"),
        (
            "wxyz",
            "new: head.weight, head.bias; classes kept: none; new: w, x, y, z; left out: a, b",
        ),
        ("xd", "classes kept: d; new: x; left out: a, b, c"),
        ("abcdefghijkl", "classes kept: a, b, c, d; new: e, f, g, h, i and 3 more; left out: none"),
    ],
)
def test_a_class_keeps_the_logits_that_belong_to_its_name(now, said, heads, caplog):
    """The body has four channels, as many as the file has classes: the channels stay as they are."""
    source = build("heads:Rows", "abcd", args={"kind": "convolution"})
    save(source, list("abcd"))
    with caplog.at_level(logging.INFO):
        model = build("heads:Rows", now, seed=2, args={"kind": "convolution"}, weights="a.pth")
    assert said in caplog.messages[-1]
    assert same_weights(model.body, source.body)
    fresh = build("heads:Rows", now, seed=2, args={"kind": "convolution"})
    for row, name in enumerate(now):
        other, place = (source, "abcd".index(name)) if name in "abcd" else (fresh, row)
        assert model.head.weight[row].equal(other.head.weight[place]), name
        assert model.head.bias[row].equal(other.head.bias[place]), name


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_head_with_a_row_a_class_goes_by_name(kind, channels, heads):
    source, images = build("heads:Rows", "abcd", args={"kind": kind}), torch.randn(5, 1, 8, 8)
    save(source, list("abcd"))
    model = build("heads:Rows", "dacbx", channels, args={"kind": kind}, weights="a.pth")
    before = logits_by_name(source, "abcd", images)
    after = logits_by_name(model, "dacbx", images.expand(-1, channels, -1, -1))
    for name, logits in before.items():
        torch.testing.assert_close(after[name], logits)


@pytest.mark.parametrize("name, size", [("resnet9", 32), ("squeezenet1_1", 32), ("resnet18", 32)])
def test_the_head_of_a_model_that_comes_along_goes_by_name(name, size):
    source, images = build(name, "abc", 3, size), torch.randn(2, 3, size, size)
    save(source, list("abc"))
    model = build(name, "bca", 3, size, seed=2, weights="a.pth")
    before, after = (logits_by_name(*pair, images) for pair in ((source, "abc"), (model, "bca")))
    assert all(after[letter].allclose(before[letter], atol=1e-6) for letter in "abc")


@pytest.mark.parametrize("kind", NO_ROWS)
def test_a_head_without_a_row_a_class_is_refused_unless_the_names_are_the_same(kind, heads):
    source = build("heads:Rows", "abcd", args={"kind": kind})
    save(source, list("abcd"))
    same = build("heads:Rows", "abcd", seed=2, args={"kind": kind}, weights="a.pth")
    assert same_weights(same, source)
    with pytest.raises(Refused, match="told apart by class; a file .* is loaded by shape"):
        build("heads:Rows", "dcba", args={"kind": kind}, weights="a.pth")
    torch.save(source.state_dict(), "a.pth")
    assert same_weights(build("heads:Rows", "dcba", args={"kind": kind}, weights="a.pth"), source)


def test_a_model_that_is_another_with_few_classes_is_refused(heads):
    save(build("heads:Rows", "abcde", args={"kind": "one for few"}), list("abcde"))
    with pytest.raises(Refused, match="told apart by class"):
        build("heads:Rows", "edcb", args={"kind": "one for few"}, weights="a.pth")


@pytest.mark.parametrize("head", [{}, {"classifier.weight": torch.ones(4, 7)}], ids=["no", "other"])
def test_a_file_without_the_models_head_keeps_no_class(head, caplog):
    source = build(classes="abcd")
    save(
        source, list("abcd"), model_state_dict=source.features.state_dict(prefix="features.") | head
    )
    with caplog.at_level(logging.INFO):
        model = build(classes="dcba", seed=2, weights="a.pth")
    assert same_weights(model.features, source.features)
    assert same_weights(model.classifier, build(classes="dcba", seed=2).classifier)
    assert "new: classifier.weight, classifier.bias; classes kept: none;" in caplog.messages[-1]


@pytest.mark.parametrize("part", ["averaged", "of many devices", "half"])
def test_the_rows_that_count_go_by_name(part):
    source, other = build(classes="abcd"), build(classes="abcd", seed=1)
    state = source.state_dict()
    if part == "averaged":
        save(other, list("abcd"), ema_state_dict=state)
    elif part == "of many devices":
        save(source, list("abcd"), model_state_dict={f"module.{k}": v for k, v in state.items()})
    else:
        save(source.half(), list("abcd"))
    model = build(classes="dcba", seed=2, weights="a.pth")
    assert model.classifier.weight.flip(0).equal(source.classifier.weight.float())


@pytest.mark.parametrize(
    "names",
    [7, "abcd", None, {}, {"a": 1}, [], [1, 2, 3, 4], ["a", "a", "b", "c"], torch.ones(4), [["a"]]],
    ids=str,
)
def test_names_that_are_none_count_as_unknown(names, caplog):
    source = build(classes="abcd")
    save(source, names)
    with caplog.at_level(logging.INFO):
        assert same_weights(build(classes="dcba", seed=2, weights="a.pth"), source)
    assert caplog.messages[-1].endswith("new: nothing")


@pytest.mark.parametrize("names", [["x"], ["a", "b", "c"], [str(number) for number in range(9)]])
def test_names_that_are_not_as_many_as_the_rows_are_refused(names):
    save(build(classes="abcd"), names)
    assert "told apart by class" in refusal(classes="dcba", weights="a.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": [1]},
        {"ema_state_dict": torch.ones(3)},
        {"classes": ["a"], "model_state_dict": 7},
        {
            "classes": ["x\n\x1b[31m" * 99],
            "classifier.bias": torch.ones(()),
            "model_state_dict": None,
        },
    ],
    ids=["list", "tensor", "number", "no rows"],
)
def test_a_strange_file_of_weights_is_refused_in_one_line(content):
    torch.save(content, "a.pth")
    message = refusal(weights="a.pth")
    assert message.startswith("model.weights: ") and "\n" not in message


def test_other_names_in_a_file_leave_the_draws_of_the_run_as_they_are():
    def drawn(names):
        save(build(classes="abcd"), list(names))
        build(classes="abcd", seed=2, weights="a.pth")
        return torch.rand(3).tolist(), random.random(), float(np.random.rand())

    assert drawn("abcd") == drawn("wxyz") == drawn("dcba")


@pytest.mark.parametrize("bias", [True, False])
def test_a_gray_image_gives_what_its_copy_in_rgb_gave(bias):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias)
    model = nn.Sequential(nn.Sequential(first, nn.ReLU()), nn.Sequential(nn.Conv2d(5, 2, 1)))
    gray = torch.randn(2, 1, 9, 9)
    expected = model(gray.expand(-1, 3, -1, -1))
    adapt_first_convolution(model, 1)
    assert model[0][0].in_channels == 1 and model[1][0].in_channels == 5
    torch.testing.assert_close(model(gray), expected)
