"""The examples of one's own data, model, loss and augmentation train, and resume to the same end."""

import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_run
from PIL import Image
from test_training_runs import move_to

from cnn.config import DataConfig
from cnn.config.settings import AugmentationConfig
from cnn.datasets.build import build_data
from cnn.datasets.loader import build_loader
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.importing import import_object

# Those of trackers need packages and are longer; see test_records_trackers.py.
FILES = [
    path for path in sorted((ROOT / "examples").glob("*.py")) if not path.stem.endswith("_tracker")
]
NAMES = {
    "own_data": "load",
    "own_model": "Patches",
    "own_loss": "Focal",
    "own_optimizer": "Lion",
    "own_augmentation": "noise",
    "two_modalities": "load",
}


@pytest.fixture(autouse=True)
def imported_anew():
    """Another test has a module of that name."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]


def command(path: Path) -> list[str]:
    """The settings in the example's own words."""
    (line,) = re.findall(r"^python train.py (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [word.replace('"', "") for word in re.findall(r'[\w.]+=(?:"[^"]*"|\S+)', line)]


def make_photos() -> None:
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        name = f"photos/{['cat', 'dog'][number % 2]}_{number:02}.png"
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(name)


def make_cases() -> None:
    """Makes pictures in modality A, and the same ones inverted in P. No pixel is black in either."""
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(1, 255, (12, 12), dtype=np.uint8)
        for modality, image in (("A", pixels), ("P", 255 - pixels)):
            folder = Path("cases", modality, ["benign", "malignant"][number % 2])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:02}.png")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_trains_as_it_says_and_resumes_exactly(train, path):
    make_photos()
    make_cases()
    words = [*command(path), "train.epochs=2"]
    if path.stem in ("own_data", "two_modalities"):
        words += [
            "data.image_size=12",
            "data.args={}",
        ]  # those of the tests' settings are synthetic's
    assert f"examples.{path.stem}:{NAMES[path.stem]}" in " ".join(words)
    assert train(*words) == 0
    whole = move_to("whole")
    assert train(*words, "train.epochs=1") == 0
    # Typed again: here the examples lie outside the folder that is worked in.
    assert (
        train("--resume", *[word for word in words if "examples." in word], "train.epochs=2") == 0
    )
    assert_same_run(whole, ".")
    used = load_checkpoint(Path("checkpoints/last.pth"))
    if path.stem == "own_data":
        assert used["classes"] == ["cat", "dog"] and used["data"]["train"] > 12
    if path.stem == "two_modalities":
        assert used["classes"] == ["benign", "malignant"] and used["preprocessing"]["channels"] == 2


def test_an_example_is_short():
    assert {path.stem for path in FILES} == NAMES.keys()
    for path in FILES:
        code = re.sub(r'^""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
        assert len(lines) <= (30 if path.stem == "two_modalities" else 15), path.name


def test_the_loss_and_the_augmentation_do_what_they_say():
    focal = import_object("examples.own_loss:Focal", "loss.name")
    logits, labels = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    shares = [0.5, math.exp(3) / (1 + math.exp(3))]
    expected = np.mean([-((1 - p) ** 1.5) * math.log(p) for p in shares])
    assert focal(gamma=1.5)(logits, labels).item() == pytest.approx(expected)
    noise = import_object("examples.own_augmentation:noise", "data.augment")
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    made = [noise(image) for _ in range(20)]
    changed = [other for other in made if not other.equal(image)]
    assert 3 < len(changed) < 17
    assert all(8 < other.float().std() < 12 and other.dtype == torch.uint8 for other in changed)


@pytest.mark.parametrize("cut", ["crop", "resized_crop"])
def test_both_modalities_of_a_case_get_the_same_crop_and_flip(cut):
    make_cases()
    augment = [AugmentationConfig(name) for name in (cut, "flip", "vflip")]
    cfg = DataConfig("examples.two_modalities:load", "cases", batch_size=32, augment=augment)
    data = build_data(cfg, 0)
    device, pre = torch.device("cpu"), data.preprocessing
    loader = build_loader(cfg, data.train, pre, device, 0, training=True)
    mean, std = (torch.tensor(each)[:, None, None] for each in (pre.mean, pre.std))
    seen = [torch.stack([data.train[index] for index in range(len(data.train))])]
    for epoch in (1, 2, 3):
        ((images, _, _),) = loader.train_batches(epoch)
        pixels = ((images * std + mean) * 255).round()  # N, 2, S, S
        padding = (pixels == 0).all(1)
        off = (pixels.sum(1) - 255).abs()[~padding].max()
        assert off <= (0 if cut == "crop" else 2)  # resizing rounds twice
        assert padding.any() == (cut == "crop")
        seen.append(pixels[loader.order(epoch).argsort()])
    for before, after in itertools.pairwise(seen):
        assert (before != after).flatten(1).any(1).float().mean() > 0.7


@pytest.mark.parametrize("modality", ["A", "P"])
def test_a_case_without_one_of_its_pictures_is_named_and_nothing_is_lost(train, capfd, modality):
    make_cases()
    words = ["data.name=examples.two_modalities:load", "data.root=cases", "data.args={}"]
    assert train(*words, "train.epochs=2") == 0
    whole = move_to("whole")
    assert train(*words, "train.epochs=1") == 0
    folders = [Path(name) for name in ("checkpoints", "logs")]
    left = {path: path.read_bytes() for folder in folders for path in folder.rglob("*.*")}
    gone = Path("cases", modality, "malignant", "03.png")
    gone.rename("elsewhere.png")
    capfd.readouterr()
    for start in (words, ["--resume", words[0], "train.epochs=2"]):
        assert train(*start) == 2
        assert f"data.root: missing, 1 of 24 cases: {gone}\n" in capfd.readouterr().err
    kept = {path: path.read_bytes() for folder in folders for path in folder.rglob("*.*")}
    assert kept == left
    Path("elsewhere.png").rename(gone)
    assert train("--resume", words[0], "train.epochs=2") == 0
    assert_same_run(whole, ".")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (12, 13)), "benign/02.png: pictures of one case differ in size"),
        (Image.new("I;16", (12, 12)), "P/benign/02.png: expected 8 bits per value, got mode I;16"),
    ],
    ids=["size", "16 bits"],
)
def test_a_picture_that_cannot_be_a_channel_is_refused_by_name(train, capfd, image, message):
    make_cases()
    image.save("cases/P/benign/02.png")
    words = ["data.name=examples.two_modalities:load", "data.root=cases", "data.args={}"]
    assert train(*words) == 2
    assert message in capfd.readouterr().err
