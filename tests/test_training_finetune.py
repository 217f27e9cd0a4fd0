"""Fine-tuning: weights from a file, a body that is frozen at first, rare classes; resumed exactly."""

import re
import shutil
import signal
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, history
from processes import run
from test_training_runs import move_to, write_folder
from torchvision import models

import export
import train as script
from cnn.errors import Stopped
from cnn.training.saver import Saver
from cnn.utils.checkpoint import load_checkpoint

FINETUNE = [
    *("--config", str(ROOT / "configs/finetune.yaml"), "data.root=photos", "data.image_size=32"),
    *("data.num_workers=0", "train.epochs=2", "train.precision=fp32", "log.report=false"),
]
FREEZE = [
    "optim.freeze=^features",
    "optim.freeze_epochs=1",
    "optim.groups=[{match: ^f, lr_scale: 0.5}]",
]


def test_pretrained_weights_from_a_file_need_no_internet(train, capfd):
    write_folder(Path("photos"), {"cat": 6, "dog": 6, "bird": 6})
    source = models.resnet18().state_dict()  # a thousand classes, as in torchvision's file
    torch.save(source, "resnet18-f37072fd.pth")
    words = ["model.name=resnet18", "model.weights=resnet18-f37072fd.pth", "optim.freeze_epochs=1"]
    assert train(*FINETUNE, *words, "checkpoint.every_epochs=1") == 0
    said = capfd.readouterr().err
    assert (
        "weights from resnet18-f37072fd.pth: 120 of 122 tensors, left over: fc.weight, fc.bias; new: fc.weight, fc.bias"
        in said
    )
    assert "frozen for the first 1 epochs: backbone" in said
    first = load_checkpoint(Path("checkpoints/epoch_001.pth"))["model_state_dict"]
    second = load_checkpoint(Path("checkpoints/epoch_002.pth"))["model_state_dict"]
    assert first["fc.weight"].shape == (3, 512)
    for name, tensor in source.items():
        if not name.startswith("fc"):
            assert first[name].equal(tensor), "the body is as it came, statistics too"
    changed = [name for name in first if not first[name].equal(second[name])]
    assert {"conv1.weight", "bn1.weight", "bn1.running_mean", "fc.weight"} <= set(changed)


COLORS = """
from PIL import Image

RGB = {"apple": "red", "leaf": "lime", "sky": "blue", "coal": "black", "snow": "white"}

def load(root, names):
    images = [(Image.new("RGB", (8, 8), RGB[name]), number) for number, name in enumerate(names)]
    return {"train": images * 8, "val": images, "classes": names}
"""
COLORED = [
    *("data.name=colors:load", "data.image_size=8", "data.augment=[]", "data.batch_size=4"),
    *("model.args={width: 8, dropout: 0}", "optim.freeze=^features", "data.num_workers=0"),
]
AS_IT_CAME = ["optim.lr=1e-12", "optim.freeze_epochs=1", "train.epochs=1"]
NAMES = ["apple", "leaf", "sky"]


@pytest.fixture(scope="module")
def colored(tmp_path_factory) -> Path:
    """The checkpoints of a run that names every color, trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("colored"))
        patch.setattr(sys, "path", list(sys.path))
        Path("colors.py").write_text(COLORS)
        words = [*TINY, *COLORED, "train.epochs=8", "train.ema_decay=0.5", "optim.lr=0.05"]
        assert script.main([*words, f"data.args={{names: {NAMES}}}"]) == 0
        assert export.main(["--format", "weights"]) == 0
        assert float(history(".")[-1]["val_acc"]) == 1
        return Path.cwd() / "checkpoints"


@pytest.mark.parametrize(
    "now, known, said",
    [
        (["sky", "apple", "leaf"], 3, "kept: sky, apple, leaf; new: none; left out: none"),
        (["coal", "apple", "leaf", "sky"], 3, "kept: apple, leaf, sky; new: coal; left out: none"),
        (["sky", "leaf"], 2, "kept: sky, leaf; new: none; left out: apple"),
        (["sky", "coal", "apple"], 2, "kept: sky, apple; new: coal; left out: leaf"),
        (["coal", "snow"], 0, "kept: none; new: coal, snow; left out: apple, leaf, sky"),
    ],
    ids=["another order", "one more", "one fewer", "one replaced", "others"],
)
def test_classes_keep_their_accuracy_wherever_they_stand(train, colored, capfd, now, known, said):
    Path("colors.py").write_text(COLORS)
    for file in ("last.pth", "best_weights.pt"):
        words = [*COLORED, *AS_IT_CAME, f"data.args={{names: {now}}}"]
        assert train(*words, f"model.weights={colored / file}") == 0
        assert f"; classes {said}\n" in capfd.readouterr().err
        head = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
        saved = torch.load(colored / file, weights_only=True)
        before = saved.get("ema_state_dict") or saved["model_state_dict"]
        for name in set(now) & set(NAMES):
            row, old = now.index(name), NAMES.index(name)
            for part in ("classifier.weight", "classifier.bias"):
                torch.testing.assert_close(head[part][row], before[part][old])
        if known == len(now):
            assert float(history(".")[-1]["val_acc"]) == 1


def test_a_resumed_run_does_not_arrange_its_classes_again(train, colored, capfd):
    Path("colors.py").write_text(COLORS)
    shutil.copy(colored / "last.pth", "begin.pth")
    words = [*COLORED, *AS_IT_CAME, "data.args={names: [sky, leaf, apple]}"]
    assert train(*words, "model.weights=begin.pth") == 0
    Path("begin.pth").unlink()
    assert train("--resume", "data.name=colors:load", "train.epochs=2") == 0
    assert capfd.readouterr().err.count("classes kept") == 1
    assert float(history(".")[-1]["val_acc"]) == 1


def test_without_internet_the_error_says_what_to_fetch_and_how_to_pass_it(
    train, capfd, monkeypatch
):
    def cut_off(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", "empty")
    monkeypatch.setattr(torch.hub, "download_url_to_file", cut_off)
    write_folder(Path("photos"), {"cat": 6, "dog": 6})
    assert train(*FINETUNE, "model.name=resnet18") == 2
    said = capfd.readouterr().err
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth elsewhere" in said
    assert "set model.weights=resnet18-f37072fd.pth\n" in said and "Traceback" not in said


def test_a_body_frozen_at_first_learns_afterwards(train, capfd):
    words = ["train.epochs=3", "checkpoint.every_epochs=1", *FREEZE, "train.ema_decay=0.5"]
    assert train("train.epochs=1") == 0
    before = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
    shutil.copy("checkpoints/last.pth", "begin.pth")
    assert train("model.weights=begin.pth", *words) == 0
    contents = [load_checkpoint(Path(f"checkpoints/epoch_00{n}.pth")) for n in (1, 2)]
    for part in ("model_state_dict", "ema_state_dict"):
        first, second = (content[part] for content in contents)
        for name in before:
            is_head = name.startswith("classifier")
            assert first[name].equal(before[name]) == (not is_head), f"{part}.{name} in epoch 1"
            assert not second[name].equal(first[name]), f"{part}.{name} in epoch 2"


def stop_after_each_step(saver: Saver, between_steps=Saver.between_steps) -> None:
    between_steps(saver)
    raise Stopped(signal.SIGTERM)


RUNS = {
    "frozen at first, sgd": [*FREEZE, "loss.class_weights=[1, 2, 5]", "train.accumulate=2"],
    "frozen at first, adamw, fp16": [*FREEZE, "optim.name=adamw", "train.precision=fp16"],
    "balanced, from memory": ["data.sampler=balanced", *FREEZE, "loss.class_weights=[1, 2, 5]"],
    "balanced, image by image": [
        *("data.sampler=balanced", "data.in_memory=false", "train.ema_decay=0.8"),
    ],
    "weights for a part, mixed": [
        *("model.weights=../part.pth", "model.partial_weights=true", "optim.layer_decay=0.8"),
        *("optim.groups=[{part: backbone, lr_scale: 0.1}]", "train.mixup=0.4", "train.cutmix=1"),
    ],
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_stopped_after_every_step_ends_the_same(train, monkeypatch, settings):
    words = [*settings, "train.epochs=3", "optim.lr=0.02"]
    if "model.weights=../part.pth" in words:  # gone at the resumes, which do not need it
        assert train("train.epochs=1", "run=other") == 0
        state = load_checkpoint(Path("checkpoints/other/last.pth"))["model_state_dict"]
        kept = {
            name: tensor
            for name, tensor in state.items()
            if name[:10] in ("features.0", "features.2")
        }
        torch.save(kept, "../part.pth")
        new = [name for name in state if name not in kept and "running" not in name]
    assert train(*words) == 0
    if "model.weights=../part.pth" in words:
        saved = load_checkpoint(Path("checkpoints/last.pth"))["new_parameters"]
        assert saved == [name for name in new if "num_batches" not in name]
    whole = move_to("whole")
    with monkeypatch.context() as cut_short:
        cut_short.setattr(Saver, "between_steps", stop_after_each_step)
        status, stops = train(*words), 0
        while status != 0:
            assert status == 128 + signal.SIGTERM
            status, stops = train("--resume"), stops + 1
    steps = load_checkpoint(Path("checkpoints/last.pth"))["step"]
    assert stops == steps and steps in (6, 12)
    assert_same_run(whole, ".")


def test_a_balanced_run_killed_within_an_epoch_ends_the_same_with_other_workers(tmp_path):
    words = [*TINY, "data.sampler=balanced", "data.in_memory=false", "checkpoint.every_steps=1"]
    assert run(tmp_path / "whole", *words)[0] == 0
    trap = ("training", 5, signal.SIGKILL)  # in the second epoch
    assert run(tmp_path / "killed", *words, "data.num_workers=2", trap=trap)[0] == -signal.SIGKILL
    assert run(tmp_path / "killed", "--resume", "data.num_workers=1")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_more_frozen_epochs_typed_on_a_resume_are_taken(train, capfd):
    assert train(*FREEZE, "train.epochs=2") == 0
    before = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
    assert train("--resume", "train.epochs=3", "optim.freeze_epochs=3") == 0
    after = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
    assert {name for name in before if not before[name].equal(after[name])} == {
        *("classifier.weight", "classifier.bias"),
    }
    assert train("--resume", "train.epochs=4", "optim.freeze=features.0") == 2
    assert re.search(r"optim.freeze +\^features +features.0 +cannot change", capfd.readouterr().err)


@pytest.mark.parametrize(
    "freeze, said",
    [
        ("^backbone", "optim.freeze: no parameter's name matches '^backbone'; names are such as"),
        (".", "command line: optim.freeze: matches every parameter; leave something to train"),
    ],
)
def test_a_freeze_that_cannot_be_is_refused(train, capfd, freeze, said):
    assert train(f"optim.freeze={freeze}", "optim.freeze_epochs=1") == 2
    assert said in capfd.readouterr().err
