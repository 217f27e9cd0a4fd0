"""Keys that are not there: what they were meant to be."""

from pathlib import Path

import pytest
from conftest import ROOT

import compare
import sweep
import train as script
from cnn.config import load_config
from cnn.config.hints import ALIASES, ELSEWHERE
from cnn.config.settings import Config, keys_of
from cnn.errors import Refused

SLIPS = {
    "optim.lr": "lr train.lr model.lr schedule.lr learning_rate train.learning_rate optim.base_lr",
    "optim.momentum": "momentum train.momentum optim.momentun",
    "optim.weight_decay": "weight_decay train.wd optim.wd optim.weigth_decay",
    "optim.name": "optimizer train.optimizer",
    "data.batch_size": "bs batch_size train.batch_size train.batch loader.batchsize data.batchsize",
    "data.num_workers": "workers num_workers data.workers train.num_workers data.num_worker",
    "data.image_size": "img_size data.img_size imgsz data.size model.image_size data.input_size",
    "data.root": "data_dir data.path root dataset.root data.data_dir",
    "data.name": "dataset",
    "data.val_fraction": "val_split data.val_split data.val_fracton",
    "data.augment": "augment transforms data.transforms train.augmentation",
    "data.folds": "kfold data.n_splits",
    "model.name": "arch backbone model.arch",
    "model.pretrained": "pretrained train.pretrained",
    "loss.name": "criterion",
    "loss.label_smoothing": "label_smoothing train.label_smoothing loss.smoothing",
    "loss.class_weights": "loss.weight class_weights",
    "schedule.name": "scheduler lr_scheduler",
    "schedule.warmup_epochs": "warmup optim.warmup train.warmup_epochs schedule.warmup",
    "schedule.milestones": "milestones optim.milestones",
    "train.epochs": "epochs num_epochs optim.epochs max_epochs train.epoch",
    "train.precision": "amp train.amp fp16 train.mixed_precision",
    "train.early_stop_patience": "patience train.patience early_stopping",
    "train.clip_grad_norm": "clip train.grad_clip optim.clip_grad_norm",
    "train.accumulate": "train.accumulation_steps",
    "train.ema_decay": "ema train.ema",
    "checkpoint.monitor": "monitor train.monitor",
    "checkpoint.every_epochs": "save_freq checkpoint.save_every",
    "seed": "train.seed random_seed sed",
    "device": "gpu train.device cuda",
    "run": "exp_name output_dir",
}
PAIRS = [(slip, key) for key, slips in SLIPS.items() for slip in slips.split()]


@pytest.mark.parametrize(("slip", "key"), PAIRS)
def test_a_slip_is_led_to_the_right_key(slip, key):
    with pytest.raises(Refused) as caught:
        load_config(None, [f"{slip}=1"])
    assert str(caught.value).endswith(f"did you mean '{key}'?"), caught.value


@pytest.mark.parametrize(
    ("slip", "where"),
    [
        ("model.num_classes", "it comes from the data"),
        ("nc", "it comes from the data"),
        ("model.dropout", "model.args={NAME: VALUE}"),
        ("resume", "--resume"),
        ("train.gpus", "torchrun"),
    ],
)
def test_what_is_no_setting_is_said_where_it_is(slip, where):
    with pytest.raises(Refused, match="no such key — ") as caught:
        load_config(None, [f"{slip}=1"])
    assert where in str(caught.value)


def test_an_alias_is_no_key_and_leads_to_one_only():
    known = dict(keys_of(Config))
    words = [word for table in (ALIASES, ELSEWHERE) for line in table.items() for word in (
        line[1].split() if table is ALIASES else line[0].split())]  # fmt: skip
    assert ALIASES.keys() <= known.keys() and len(set(words)) == len(words)
    assert not {word for word in words if word in known}
    assert len(PAIRS) >= 60


def test_the_other_scripts_file_is_told(capsys):
    assert script.main(["--config", str(ROOT / "configs/sweep.yaml")]) == 2
    assert "sweep.yaml: is a file of sweep.py: python sweep.py " in capsys.readouterr().err
    assert sweep.main([str(ROOT / "configs/config.yaml")]) == 2
    assert "config.yaml: is a file of train.py: python train.py --config" in capsys.readouterr().err


def test_a_wrong_name_is_answered_with_those_that_there_are(train, capsys):
    for name in ("first", "second"):
        assert train(f"run={name}") == 0
    capsys.readouterr()
    assert compare.main(["frist"]) == 2
    assert "frist: no run there: expected a name (first, second)" in capsys.readouterr().err
    assert train("--resume", "checkpoints/frist/last.pth") == 2
    files = ", ".join(str(Path("checkpoints", name, "last.pth")) for name in ("first", "second"))
    assert f"other runs have {files}" in capsys.readouterr().err


def test_nothing_like_it_is_no_suggestion():
    with pytest.raises(Refused, match="no such key$"):
        load_config(None, ["zzzzqqqq=1"])
