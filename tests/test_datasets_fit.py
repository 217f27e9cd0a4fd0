"""How a picture becomes a square, and at which scale JPEG files are decoded: the same everywhere."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import FIRST_FORMAT
from PIL import Image
from torch import nn

import evaluate
import predict
from cnn.datasets.decode import open_image, to_array
from cnn.datasets.preprocessing import Form, Normalize
from cnn.inference.predictor import load

FOLDER = ["data.name=folder", "data.root=photos", "data.args={}", "data.image_size=32"]
LEARN = [*FOLDER, "data.augment=[]", "data.batch_size=8", "optim.lr=0.01", "train.epochs=5"]


def noise(path: str, width: int, height: int, seed: int, mark: int | None = None) -> None:
    """A JPEG file of noise, with a mark of this brightness at its left end."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 196, (height, width, 3), np.uint8)
    if mark is not None:
        pixels[:, : width // 6] = mark
    Image.fromarray(pixels).save(path, quality=90)


@pytest.fixture
def panoramas() -> None:
    """Pictures of 300 x 100 pixels, which only their left ends tell apart."""
    for split, number in (("train", 60), ("test", 50)):
        for mark, name in ((0, "dark"), (255, "bright")):
            for index in range(number):
                path = f"photos/{split}/{name}/{index:02}.jpg"
                noise(path, 300, 100, mark * 1000 + number * 100 + index, mark)


def figures() -> dict:
    return json.loads(Path("logs/result.json").read_text())["test"]


def log() -> str:
    return Path("logs/train.log").read_text(encoding="utf-8")


def table(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_is_cut_away_cannot_be_learnt_and_that_is_said(panoramas, train):
    assert train(*LEARN) == 0
    assert 0.3 < figures()["test_acc"] < 0.7
    expected = "cuts away 67% of the pixels; data.fit=pad or stretch keeps all"
    assert log().count(expected) == 1 and expected in Path("logs/data.txt").read_text()
    assert "67% of the pixels" in Path("logs/data.txt").read_text()


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_what_lies_at_the_end_is_learnt_where_nothing_is_cut_away(panoramas, train, fit):
    assert train(*LEARN, f"data.fit={fit}") == 0
    assert figures()["test_acc"] >= 0.99
    assert "cuts away" not in log()
    lines = [" ".join(line.split()) for line in Path("logs/data.txt").read_text().splitlines()]
    assert f"data.fit {fit}" in lines
    assert not any("cut away" in line for line in lines)
    assert evaluate.main(["--json", "evaluated.json"]) == 0
    metrics = json.loads(Path("evaluated.json").read_text())["metrics"]
    assert metrics == figures()
    assert predict.main(["photos/test", "--csv", "predicted.csv"]) == 0
    right = [row["prediction"] == Path(row["image"]).parent.name for row in table("predicted.csv")]
    assert len(right) == 100 and sum(right) == 100 * metrics["test_acc"]
    assert predict.main(["photos/train", "--csv", "predicted.csv"]) == 0
    predicted = {row["image"]: row["prediction"] for row in table("predicted.csv")}
    validated = {row["image"]: row["prediction"] for row in table("logs/predictions_val.csv")}
    assert len(validated) == 12 and validated.items() <= predicted.items()


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_a_picture_for_random_crops_is_as_sharp_as_one_for_evaluation(fit):
    stripes = 255 * (torch.arange(1000) // 10 % 2).to(torch.uint8).expand(3, 60, 1000)
    for_evaluation, for_crops = (Form(224, 3, fit, margin=m).apply(stripes) for m in (False, True))
    contrasts = [
        image[:, image.shape[1] // 2].float().std() for image in (for_evaluation, for_crops)
    ]
    assert contrasts[1] >= contrasts[0] > 50


def test_what_is_cut_away_is_told_with_random_crops_too(panoramas, train):
    words = ["data.augment=[resized_crop, flip]", "data.limit=20", "train.epochs=1"]
    assert train(*LEARN, *words) == 0
    assert "data.fit=crop cuts away 67% of the pixels" in log()


def test_a_little_may_be_cut_away_without_a_word(train):
    for name in ("a", "b"):
        for index in range(6):
            noise(f"photos/{name}/{index}.jpg", 49, 40, ord(name) + 1000 * index)  # 18 %
    assert train(*FOLDER, "train.epochs=1") == 0
    assert "cuts away" not in log() and "18% of the pixels" in log()


SEEN = """
from torch import nn

LOGITS = []

class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layer = nn.Linear(in_channels * 32 * 32, num_classes)
    def forward(self, images):
        logits = self.layer(images.flatten(1))
        if len(images) in (6, 10):  # val and test; others try the model out
            LOGITS.append(logits.detach().clone())
        return logits
"""


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_validation_evaluation_and_prediction_give_the_same_logits(train, monkeypatch, fit):
    """For JPEG files that are decoded at a smaller scale; to the last bit."""
    monkeypatch.delitem(sys.modules, "seen", raising=False)  # of another test's folder
    Path("seen.py").write_text(SEEN)
    for split, number in (("train", 4), ("val", 3), ("test", 5)):
        for name in ("a", "b"):
            for index in range(number):
                seed = ord(name) + 1000 * index + 100 * number
                noise(f"photos/{split}/{name}/{index}.jpg", 300, 200 + index, seed)
    words = [*FOLDER, f"data.fit={fit}", "data.augment=[]", "model.name=seen:Net", "model.args={}"]
    assert train(*words, "train.epochs=1", "data.on_duplicate=ignore") == 0
    assert "24 JPEG files at 1/2, 1/4 or 1/8" in Path("logs/data.txt").read_text()
    logits = sys.modules["seen"].LOGITS
    validated, tested = logits[-2:]
    logits.clear()
    assert evaluate.main(["--split", "val"]) == evaluate.main(["--split", "test"]) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert evaluate.main(["--split", "val"]) == evaluate.main(["--split", "test"]) == 0
    assert predict.main(["photos/val"]) == predict.main(["photos/test"]) == 0
    for got, expected in zip(logits, [validated, tested] * 3, strict=True):
        assert torch.equal(got, expected)


def test_checkpoints_that_name_no_fit_and_no_scale_decode_in_full_and_crop():
    """Here of the first version; the same photographs decoded at a smaller scale differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 30, 40), np.uint8)
    losses = {}
    for number, pixels in enumerate(coarse):
        path = Path(f"photos/test/pattern {number}/photo.jpg")
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).resize((1200, 900)).save(path)
    predictor = load(FIRST_FORMAT)
    normalize = Normalize(predictor.trained.preprocessing, torch.device("cpu"))
    for scaled in (False, True):
        form = Form(8, 1, scaled=scaled)
        paths = sorted(Path("photos").rglob("*.jpg"))
        images = [form.apply(torch.from_numpy(to_array(open_image(path, form.least_side), 1)))
                  for path in paths]  # fmt: skip
        with torch.no_grad():
            logits = predictor.model(normalize(torch.stack(images)))
        losses[scaled] = nn.functional.cross_entropy(logits, torch.arange(3)).item()
        answers = [dict(zip(answer.classes, answer.probabilities)) for answer in predictor(paths)]
        answers = [[answer[name] for name in predictor.classes] for answer in answers]
        assert (answers == logits.softmax(1).tolist()) == (not scaled)
    words = ["data.name=folder", "data.root=photos", "data.args={}", "--json", "evaluated.json"]
    assert evaluate.main(["--checkpoint", str(FIRST_FORMAT), *words]) == 0
    loss = json.loads(Path("evaluated.json").read_text())["metrics"]["test_loss"]
    assert loss == pytest.approx(losses[False], abs=1e-6) and abs(loss - losses[True]) > 1e-5
