"""The examples of one's own data, model, loss and augmentation train, and resume to the same end."""

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

from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.importing import import_object

FILES = sorted((ROOT / "examples").glob("*.py"))
NAMES = {
    "own_data": "load",
    "own_model": "Patches",
    "own_loss": "Focal",
    "own_optimizer": "Lion",
    "own_augmentation": "noise",
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_trains_as_it_says_and_resumes_exactly(train, path):
    make_photos()
    words = [*command(path), "train.epochs=2"]
    if path.stem == "own_data":
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


def test_an_example_is_short():
    assert {path.stem for path in FILES} == NAMES.keys()
    for path in FILES:
        code = re.sub(r'^""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
        assert len(lines) <= 15, path.name


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
