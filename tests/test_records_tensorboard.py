"""TensorBoard's curves are one line through all kills, read back with its own reader."""

import shutil
import signal
from pathlib import Path

import pytest
from conftest import TINY, history
from processes import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORDS = [
    *(*TINY, "log.tensorboard=true", "train.epochs=3", "checkpoint.every_steps=1"),
    *("optim.groups=[{match: classifier, lr_scale: 0.1}]", "schedule.name=cosine"),
]


def read(folder: Path | str, kind: str = "scalars") -> dict[str, list]:
    """For each part/tag, its steps and values (of pictures, their sizes)."""
    found = {}
    for part in ("train", "val", "test", "."):
        files = EventAccumulator(
            str(Path(folder, "logs/tensorboard", part)), {"images": 0, "scalars": 0}
        )
        files.Reload()
        for tag in files.Tags()[kind]:
            items = files.Scalars(tag) if kind == "scalars" else files.Images(tag)
            found[f"{part}/{tag}"] = [
                (item.step, item.value if kind == "scalars" else item.width) for item in items
            ]
    return found


def test_a_run_killed_twice_has_the_curves_of_the_unbroken_one(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert run(unbroken, *WORDS)[0] == 0
    assert run(killed, *WORDS, trap=("training", 6, signal.SIGKILL))[0] == -signal.SIGKILL
    # Saved with the epoch trained and not yet validated.
    assert run(killed, "--resume", trap=("before validation", 0, signal.SIGTERM))[0] == 143
    status, output = run(killed, "--resume")
    assert status == 0, output
    curves = read(unbroken)
    assert read(killed) == curves
    for points in curves.values():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))
    rows = history(unbroken)
    for part, tag in (("train", "loss"), ("val", "loss"), ("train", "acc"), ("val", "acc")):
        column = f"{part}_{tag}"
        expected = [(int(r["step"]), pytest.approx(float(r[column]), rel=1e-6)) for r in rows]
        assert curves[f"{part}/{tag}"] == expected
    assert [step for step, _ in curves["train/lr"]] == [int(row["step"]) for row in rows]
    pictures = read(unbroken, "images")
    assert read(killed, "images") == pictures
    assert pictures.keys() == {"train/training images", "val/confusion"}
    assert len(list((killed / "logs/tensorboard").rglob("*tfevents*"))) == 4


def test_events_ahead_of_the_checkpoint_are_taken_back(train):
    words = ["log.tensorboard=true", "train.epochs=3", "checkpoint.every_epochs=1"]
    assert train(*words) == 0
    first, pictures = read("."), read(".", "images")["val/confusion"]
    assert len(pictures) == 3
    assert train("--resume", "checkpoints/epoch_001.pth", "optim.lr=30") == 0
    assert read(".", "images")["val/confusion"] == pictures[:1]  # there was no better one
    curves, rows = read("."), history(".")
    assert curves["train/loss"][0] == first["train/loss"][0]
    assert curves["train/loss"][1] != first["train/loss"][1]
    for tag in ("train/loss", "val/loss"):
        column = tag.replace("/", "_")
        expected = [(int(r["step"]), pytest.approx(float(r[column]), rel=1e-6)) for r in rows]
        assert curves[tag] == expected


@pytest.mark.parametrize("damage", ["torn", "gone", "two of them"])
def test_whatever_has_become_of_the_files_a_resume_makes_them_whole(train, damage):
    assert train("log.tensorboard=true", "train.epochs=2") == 0
    for path in list(Path("logs/tensorboard").rglob("*tfevents*")):
        if damage == "torn":
            path.write_bytes(path.read_bytes()[:-7])
        elif damage == "two of them":  # killed between the new file and the removal of the old
            shutil.copy(path, path.with_name(path.name + ".1"))
    if damage == "gone":
        shutil.rmtree("logs/tensorboard")
    assert train("--resume", "train.epochs=3") == 0
    steps = [int(row["step"]) for row in history(".")]
    curves = read(".")
    for tag in ("train/loss", "val/acc", "train/lr"):
        assert [step for step, _ in curves[tag]] == steps
    assert [step for step, _ in curves["test/acc"]] == [steps[-1]]


def test_graph_hyperparameters_and_the_rates_of_groups_are_there(train):
    groups = "optim.groups=[{match: classifier, lr_scale: 0.1}]"
    assert train("log.tensorboard=true", groups) == 0
    files = EventAccumulator("logs/tensorboard/train")
    files.Reload()
    assert files.Tags()["graph"]
    curves = read(".")
    assert [value for _, value in curves["train/lr_x0.1"]] == [pytest.approx(0.005)] * 2
    assert "./hparam/test_acc" in curves and "./hparam/val_loss" in curves


def test_a_model_that_cannot_be_traced_has_its_pictures_once_after_resumes(train):
    Path("untraced.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self, in_channels=1, num_classes=3, **_):\n"
        "        super().__init__()\n"
        "        self.last = torch.nn.Linear(64 * in_channels, num_classes)\n"
        "    def forward(self, images):\n"
        "        if torch.jit.is_tracing():\n"
        "            raise RuntimeError('on purpose')\n"
        "        return self.last(images.flatten(1))\n"
    )
    words = ["log.tensorboard=true", "model.name=untraced:Model", "model.args={}"]
    assert train(*words, "train.epochs=1") == 0
    for epochs in (2, 3):
        assert train("--resume", f"train.epochs={epochs}", words[1]) == 0
    assert [step for step, _ in read(".", "images")["train/training images"]] == [0]
