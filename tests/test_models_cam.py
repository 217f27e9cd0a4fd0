"""Grad-CAM: the map's maximum lies on what the class depends on; other networks are refused."""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import predict
from cnn.config import ModelConfig
from cnn.errors import Refused
from cnn.models.build import build_model
from cnn.models.cam import grad_cam, overlay

SIDE, MARK = 48, 14


def marked(number: int, seed: int):
    """Noise with a mark of stripes: lying in class 0, standing in class 1; and where it is."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(number, 1, SIDE, SIDE, generator=generator)
    corners = torch.randint(0, SIDE - MARK, (number, 2), generator=generator)
    labels = torch.arange(number) % 2
    for image, corner, label in zip(images, corners, labels):
        put_mark(image, corner, label)
    return images, labels, corners


def put_mark(image: torch.Tensor, corner: torch.Tensor, label: torch.Tensor) -> None:
    stripes = (torch.arange(MARK) // 2 % 2 * 2.0 - 1).expand(MARK, MARK)
    top, left = corner.tolist()
    image[0, top : top + MARK, left : left + MARK] += stripes if label else stripes.T


@functools.cache
def trained() -> nn.Module:
    config = ModelConfig("simple_cnn", args={"width": 16})
    model, _ = build_model(config, ["lying", "standing"], 1, SIDE, 0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        images, labels, _ = marked(32, step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def share_within(maps: torch.Tensor, corners: torch.Tensor) -> float:
    """Of how many maps the maximum lies on the mark."""
    at = maps.flatten(1).argmax(1)
    places = torch.stack([at // SIDE, at % SIDE], 1)
    return ((places >= corners) & (places < corners + MARK)).all(1).float().mean().item()


def test_the_maximum_lies_on_the_mark():
    model = trained()
    images, labels, corners = marked(200, 1000)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.95
        maps = grad_cam(model, images, labels)
    assert maps.shape == (200, SIDE, SIDE) and maps.min() >= 0 and maps.max() <= 1
    assert share_within(maps, corners) >= 0.9
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_of_two_marks_the_map_is_on_that_of_the_class():
    images, labels, corners = marked(200, 1000)
    opposite = (corners + SIDE // 2) % (SIDE - MARK)
    apart = (corners - opposite).abs().amax(1) >= MARK
    for image, corner, label in zip(images, opposite, 1 - labels):
        put_mark(image, corner, label)
    for classes, places in ((labels, corners), (1 - labels, opposite)):
        maps = grad_cam(trained(), images[apart], classes[apart])
        assert share_within(maps, places[apart]) >= 0.9


def transformers():
    from torchvision.models import SwinTransformer, VisionTransformer

    yield VisionTransformer(32, 16, 1, 1, 8, 8, num_classes=2), "MultiheadAttention"
    yield SwinTransformer([4, 4], 8, [2], [1], [4, 4], num_classes=2), "ShiftedWindowAttention"


def test_a_transformer_is_refused_by_name():
    for model, attention in transformers():
        with pytest.raises(Refused, match=f"convolutional networks, .* {attention}"):
            grad_cam(model.eval(), torch.zeros(1, 3, 32, 32), torch.tensor([0]))


class Tokens(nn.Module):
    """A stem of patches, and then no convolution, as in MLP-Mixer."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.mix(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


class ChannelAttention(nn.Sequential):
    """A part of a convolutional network."""


def test_what_counts_is_how_a_network_computes_and_not_its_names():
    images, classes = torch.rand(1, 3, 32, 32), torch.tensor([0])
    with pytest.raises(Refused, match="convolutional networks, .* Linear layers on tokens"):
        grad_cam(Tokens().eval(), images, classes)
    layers = ChannelAttention(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert grad_cam(nn.Sequential(*layers, nn.Linear(4, 2)).eval(), images, classes).shape[1:] == (
        *(32, 32),
    )


class Apart(nn.Module):
    """A convolution that the classes do not depend on."""

    def __init__(self):
        super().__init__()
        self.head, self.aside = nn.Linear(48, 2), nn.Conv2d(3, 4, 1)

    def forward(self, images):
        self.aside(images)
        return self.head(images.flatten(1))


def test_a_layer_that_decides_nothing_has_no_map():
    with pytest.raises(Refused, match="no layer with height and width decides"):
        grad_cam(Apart().eval(), torch.rand(1, 3, 4, 4), torch.tensor([0]))


def test_a_network_without_height_and_width_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(Refused, match="no layer with height and width decides"):
        grad_cam(model, torch.zeros(1, 1, 4, 4), torch.tensor([0]))


def test_frozen_layers_have_maps_too():
    model = copy.deepcopy(trained()).requires_grad_(False)
    assert grad_cam(model, marked(2, 0)[0], torch.tensor([0, 1])).amax((1, 2)).max() == 1


def test_where_the_map_is_0_the_picture_stays_gray():
    image = torch.full((1, 2, 2), 100, dtype=torch.uint8)
    shown = overlay(image, torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
    assert shown.shape == (3, 2, 2) and shown.dtype == torch.uint8
    assert shown[:, 0, 0].tolist() == shown[:, 1, 1].tolist() == [100] * 3
    assert shown[0, 0, 1] > shown[0, 1, 0] > 100


def test_predict_writes_a_map_of_each_picture(train, capfd):
    assert train("data.args={num_images: 40, num_classes: 2, image_size: 32}") == 0
    Path("photos").mkdir()
    for name in ("a", "b"):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{name}.jpg")
    assert predict.main(["photos", "--cam", "new/maps"]) == 0
    rows = capfd.readouterr().out.splitlines()[1:]
    first, second = sorted(Path("new/maps").iterdir())
    for path, picture, row in ((first, "00001_a", rows[0]), (second, "00002_b", rows[1])):
        name = re.fullmatch(rf"{picture}_pattern-(\d).png", path.name)
        assert f"pattern {name[1]}" in row[:30], "the predicted class"
    with Image.open(first) as shown:
        assert shown.size == (256, 256)
    for other in ("photos", "new/maps", "photos/a.jpg"):
        assert predict.main(["photos", "--cam", other]) == 2
        assert f"--cam: {other}: expected a new folder" in capfd.readouterr().err
    assert sorted(path.name for path in Path("photos").iterdir()) == ["a.jpg", "b.jpg"]


def test_the_report_shows_the_tests_mistakes_with_maps(train):
    assert train("log.report=true", "data.args={num_classes: 3, image_size: 16, noise: 90}") == 0
    page = Path("logs/report.html").read_text(encoding="utf-8")
    section = page[page.index('id="mistakes"') : page.index('id="training"')]
    told = re.findall(r"of (\d+) mistakes among \d+ (\w+) images; in colour", section)
    assert [split for _, split in told] == ["validation", "test"]
    shown = sum(min(24, int(total)) for total, _ in told)
    assert section.count("<figure>") == shown and section.count("<img") == 2 * shown
