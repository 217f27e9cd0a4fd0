"""Whole runs through the front door: what they leave, how they go on, what they refuse."""

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, finish, history
from PIL import Image
from processes import run

from cnn.records.run_record import read_run
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.run_folder import is_running


def move_to(name: str) -> Path:
    """Puts the run's folders away under a name."""
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path(name, folder))
    return Path(name)


def test_a_run_leaves_its_records(train):
    assert train("checkpoint.every_epochs=1") == 0
    left = {str(path) for folder in ("logs", "checkpoints") for path in Path(folder).glob("[!.]*")}
    assert left == {
        *("logs/train.log", "logs/history.csv", "logs/config.yaml", "logs/model.txt"),
        *("logs/predictions_val.csv", "logs/predictions_test.csv", "logs/result.json"),
        *("logs/data.txt", "logs/division.csv"),
        *("checkpoints/best.pth", "checkpoints/last.pth"),
        *("checkpoints/epoch_001.pth", "checkpoints/epoch_002.pth"),
    }
    rows = Path("logs/history.csv").read_text().splitlines()
    assert rows[0] == (
        "epoch,step,lr,train_loss,train_acc,val_loss,val_acc,val_balanced_acc,val_f1,"
        "images_per_second,seconds"
    )
    assert [row.split(",")[:2] for row in rows[1:]] == [["1", "4"], ["2", "8"]]
    log = Path("logs/train.log").read_text(encoding="utf-8")
    assert log.count("epoch 1/2  train loss") == 1 and "test_acc" in log
    assert all(line[24:].startswith("INFO") for line in log.splitlines()), log
    assert "classifier.weight" in Path("logs/model.txt").read_text()


def test_the_settings_left_behind_train_the_same_again(train):
    assert train() == 0
    first = move_to("first")
    assert train("--config", str(first / "logs/config.yaml")) == 0
    assert_same_run(first, ".")


def test_it_learns(train):
    assert (
        train("train.epochs=10", "data.augment=[]", "data.args={num_images: 300, image_size: 8}")
        == 0
    )
    assert float(history(".")[-1]["val_acc"]) > 0.9
    assert load_checkpoint(Path("checkpoints/last.pth"))["test"]["test_acc"] > 0.9


MANY_SETTINGS = {
    "plain": [],
    "image by image": ["data.in_memory=false"],
    "one worker": ["data.in_memory=false", "data.num_workers=1"],
    "three workers": ["data.in_memory=false", "data.num_workers=3"],
    "ema": ["train.ema_decay=0.8"],
    "accumulation": ["train.accumulate=3"],
    "clipping, adamw, smoothing": [
        *("train.clip_grad_norm=0.5", "optim.name=adamw", "loss.label_smoothing=0.1")
    ],
    "bf16": ["train.precision=bf16"],
    "fp16": ["train.precision=fp16"],
    "plateau": ["schedule.name=plateau", "schedule.patience=0", "schedule.warmup_epochs=1"],
    "early stopping": ["train.early_stop_patience=1", "optim.lr=1.5"],
    "groups": ["optim.groups=[{match: classifier, lr_scale: 0.1}]"],
}


@pytest.mark.parametrize("settings", MANY_SETTINGS.values(), ids=MANY_SETTINGS)
def test_a_run_lengthened_by_a_resume_equals_one_at_once(train, settings):
    assert train(*settings, "train.epochs=4") == 0
    whole = move_to("whole")
    assert train(*settings, "train.epochs=2") == 0
    assert train("--resume", "checkpoints/last.pth", "train.epochs=4") == 0
    assert_same_run(whole, ".")


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "step"])
def test_a_schedule_over_the_whole_run_goes_on_where_it_was(train, schedule):
    schedule = [f"schedule.name={schedule}", "schedule.warmup_epochs=0.5", "schedule.step_epochs=1"]
    assert train(*schedule, "train.epochs=4", "checkpoint.every_epochs=2") == 0
    shutil.copytree("logs", "whole/logs")
    shutil.copytree("checkpoints", "whole/checkpoints")
    assert train("--resume", "checkpoints/epoch_002.pth") == 0
    assert_same_run("whole", ".")


def test_going_on_from_an_earlier_file_keeps_what_is_ahead(train):
    assert train("train.epochs=3", "checkpoint.every_epochs=1", "optim.lr=0.2") == 0
    before = load_checkpoint(Path("checkpoints/last.pth"))
    assert train("--resume", "checkpoints/epoch_001.pth", "optim.lr=0.001") == 0
    (kept,) = Path("checkpoints/archive").glob("*/last.pth")
    assert load_checkpoint(kept)["history"] == before["history"]
    assert "is further than checkpoints/epoch_001.pth" in Path("logs/train.log").read_text()


def test_a_finished_run_says_so_and_tests_nothing_again(train, capfd):
    assert train() == 0
    saved = Path("checkpoints/last.pth").read_bytes()
    assert train("--resume", "checkpoints/last.pth") == 0
    assert "this run is finished" in capfd.readouterr().err
    assert Path("checkpoints/last.pth").read_bytes() == saved


def test_of_equally_good_epochs_best_pth_is_the_one_with_the_lowest_loss(train):
    """Six validation images know few accuracies: four epochs are equal, neither end is the best."""
    assert train("checkpoint.monitor=val_acc", "train.epochs=10") == 0
    rows = {int(row["epoch"]): row for row in history(".")}
    highest = max(float(row["val_acc"]) for row in rows.values())
    equal = [epoch for epoch, row in rows.items() if float(row["val_acc"]) == highest]
    best = min(equal, key=lambda epoch: float(rows[epoch]["val_loss"]))
    assert best not in (equal[0], equal[-1])
    assert load_checkpoint(Path("checkpoints/best.pth"))["best"]["epoch"] == best
    assert read_run(".").best()["epoch"] == best, "compare.py and sweeps say the same"


def test_best_pth_is_the_best_epoch_and_resumes(train):
    assert train("train.epochs=4", "optim.lr=0.8") == 0
    rows = history(".")
    best = load_checkpoint(Path("checkpoints/best.pth"))
    assert best["epoch"] == 1 + int(np.argmin([float(row["val_loss"]) for row in rows]))
    assert train("--resume", "checkpoints/best.pth", "train.epochs=5") == 0
    assert len(history(".")) == 5


def test_a_checkpoint_predicts_alone(train):
    assert train("train.ema_decay=0.5") == 0
    content = torch.load("checkpoints/best.pth", weights_only=True)
    assert content["classes"] == ["pattern 0", "pattern 1", "pattern 2"]
    keys = {"image_size", "channels", "mean", "std", "value_range", "fit", "scaled"}
    assert content["preprocessing"].keys() == keys
    for key in ("model_state_dict", "ema_state_dict"):
        assert not any(name.startswith(("module.", "_orig_mod.")) for name in content[key])


def test_compiled_models_have_plain_names(train):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its own behalf
        assert train("train.compile=true", "train.epochs=1") == 0
    content = torch.load("checkpoints/last.pth", weights_only=True)
    assert not any(name.startswith("_orig_mod.") for name in content["model_state_dict"])


def test_a_new_run_moves_the_earlier_one_aside(train):
    assert train("seed=1") == 0
    first = load_checkpoint(Path("checkpoints/last.pth"))
    assert train("seed=2") == 0
    (kept,) = Path("checkpoints/archive").iterdir()
    assert load_checkpoint(kept / "last.pth")["started"] == first["started"]
    (logs,) = Path("logs/archive").iterdir()
    assert {path.name for path in logs.iterdir()} == {
        *("train.log", "history.csv", "config.yaml", "model.txt"),
        *("predictions_val.csv", "predictions_test.csv", "result.json"),
        *("data.txt", "division.csv"),
    }
    assert kept.name == logs.name


def test_a_named_run_has_folders_of_its_own(train):
    assert train("run=first") == 0
    assert Path("checkpoints/first/best.pth").exists()
    assert not Path("checkpoints/best.pth").exists()
    assert train("--resume", "run=first", "train.epochs=3") == 0
    assert Path("logs/first/history.csv").read_text().count("\n") == 4


def test_a_refused_run_leaves_the_earlier_one_where_it_is(train):
    assert train() == 0
    before = Path("checkpoints/last.pth").read_bytes()
    assert train("model.name=resnet19") == 2
    assert Path("checkpoints/last.pth").read_bytes() == before


def test_a_dry_run_says_ok_and_leaves_nothing(train, capfd):
    assert train("--dry-run") == 0
    said = capfd.readouterr().err
    assert "dry run OK" in said and "best settings" not in said
    assert "with at most 16 images per split, the accuracies above mean nothing" in said
    assert not Path("checkpoints").exists() and not Path("logs").exists()


def test_print_config_shows_every_setting(train, capfd):
    assert train("--print-config", "optim.lr=0.25") == 0
    printed = capfd.readouterr().out
    assert "lr: 0.25" in printed and "early_stop_patience" in printed


def test_a_loss_that_is_no_number_stops_the_run_and_spoils_no_checkpoint(train, capfd):
    assert train("train.epochs=1") == 0
    good = load_checkpoint(Path("checkpoints/last.pth"))
    words = ["--resume", "checkpoints/last.pth", "train.epochs=3", "optim.lr=1e30"]
    assert train(*words) == 1
    said = capfd.readouterr().err
    assert "no longer a number: epoch 2, step 6, lr 1e+30" in said and "Traceback" not in said
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] == good["step"]


def test_frozen_parameters_and_their_norms_stay_as_they_were(train):
    assert train("train.epochs=1") == 0
    first = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
    frozen = "optim.groups=[{match: features, lr_scale: 0}]"
    assert train("model.weights=checkpoints/last.pth", frozen, "train.epochs=1") == 0
    second = load_checkpoint(Path("checkpoints/last.pth"))["model_state_dict"]
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == name.startswith("features"), name


def write_folder(root: Path, classes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.jpg")


def test_a_folder_of_images_trains(train):
    write_folder(Path("照片"), {"猫": 12, "big dog": 12, "bird": 12})
    before = sorted(Path("照片").rglob("*"))
    words = ["data.name=folder", "data.root=照片", "data.image_size=16", "data.args={}"]
    assert train(*words, "data.num_workers=2") == 0
    assert sorted(Path("照片").rglob("*")) == before
    assert "猫" in Path("logs/train.log").read_text(encoding="utf-8")


# -- twelve mistakes: one message, exit status 2, no traceback --------------------------------


def bad_yaml(text: str) -> list[str]:
    Path("bad.yaml").write_text(text)
    return ["--config", "bad.yaml"]


def folder_with_empty_class() -> list[str]:
    write_folder(Path("photos"), {"cat": 3})
    Path("photos/dog").mkdir()
    return ["data.name=folder", "data.root=photos"]


def folder_with_truncated_jpeg() -> list[str]:
    write_folder(Path("photos"), {"cat": 3, "dog": 3})
    file = Path("photos/dog/1.jpg")
    file.write_bytes(file.read_bytes()[:-200])
    return ["data.name=folder", "data.root=photos"]


MISTAKES = {
    "unknown key": (lambda: bad_yaml("optim:\n  lrr: 1\n"), "bad.yaml:2: optim.lrr: no such key — did you mean 'optim.lr'?"),
    "wrong type": (lambda: bad_yaml("seed: 0\ntrain:\n  epochs: 10.5\n"), "bad.yaml:3: train.epochs: expected a whole number of at least 1, got 10.5"),
    "out of range": (lambda: ["optim.lr=-0.1"], "command line: optim.lr: expected a number above 0, got -0.1"),
    "duplicate key": (lambda: bad_yaml("seed: 1\nseed: 2\n"), "bad.yaml:2: seed: given twice, first at bad.yaml:1"),
    "unknown model": (lambda: ["model.name=resnet19"], "did you mean 'resnet"),
    "unknown data": (lambda: ["data.name=minst"], "did you mean 'mnist'?"),
    "missing data": (lambda: ["data.name=mnist", "data.root=here"], "missing train-images-idx3-ubyte"),
    "missing resume file": (lambda: ["--resume", "checkpoints/bets.pth"], "bets.pth: no such file"),
    "empty class": (folder_with_empty_class, "has no images: photos/dog"),
    "truncated jpeg": (folder_with_truncated_jpeg, "photos/dog/1.jpg: "),
    "no such folder": (lambda: ["data.name=folder", "data.root=nowhere"], "there is none at"),
    "too small images": (lambda: ["model.name=alexnet", "model.args={}"], "cannot take images of 1x8x8"),
}  # fmt: skip


@pytest.mark.parametrize("make, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_message_and_status_2(train, capfd, make, expected):
    assert train(*make()) == 2
    captured = capfd.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err and not captured.out
    assert not Path("logs/train.log").exists()


def test_a_number_may_be_written_1e_3(train):
    assert train("--print-config", *bad_yaml("optim:\n  lr: 1e-3\n")) == 0


def test_a_checkpoint_of_another_model_is_refused_with_a_table(train, capfd):
    assert train() == 0
    assert train("--resume", "checkpoints/best.pth", "model.name=resnet20") == 2
    said = capfd.readouterr().err
    assert re.search(r"model.name +simple_cnn +resnet20 +cannot change", said)
    assert "Traceback" not in said


def test_what_changes_the_mathematics_is_taken_only_when_typed(train, capfd):
    assert train() == 0
    changed = Path("changed.yaml")
    changed.write_text(f"base: {ROOT / 'tests/tiny.yaml'}\noptim:\n  lr: 0.01\n")
    words = ["--resume", "checkpoints/last.pth", "--config", str(changed), "train.epochs=3"]
    assert train(*words) == 2
    assert "type optim.lr=0.01 on the command line" in capfd.readouterr().err
    assert train(*words, "optim.lr=0.01") == 0
    assert history(".")[-1]["lr"] == "0.01"


def test_changed_data_is_refused(train, capfd):
    write_folder(Path("photos"), {"cat": 9, "dog": 9})
    assert train("data.name=folder", "data.root=photos", "data.args={}") == 0
    shutil.copy("photos/cat/0.jpg", "photos/cat/new.jpg")
    assert train("--resume", "train.epochs=3") == 2
    assert "the data has changed since" in capfd.readouterr().err


def test_two_processes_never_write_one_run(train):
    from cnn.utils.run_folder import RunFolder

    with RunFolder(None):
        status, output = run(Path.cwd(), *TINY)
    assert status == 2
    assert "checkpoints: process" in output and "Traceback" not in output
    assert train() == 0


def test_an_error_while_running_is_in_the_log_with_its_traceback():
    Path("mine.py").write_text(
        "from torch import nn\n"
        "class Fails(nn.CrossEntropyLoss):\n"
        "    def forward(self, logits, labels):\n"
        "        assert len(labels) < 4, 'the first batch'\n"
        "        return super().forward(logits, labels)\n"
    )
    status, output = run(Path.cwd(), *TINY, "loss.name=mine:Fails")
    assert status == 1, output
    log = Path("logs/train.log").read_text()
    assert "Traceback" in log and "the first batch" in log


def test_an_operation_that_cannot_be_repeated_is_named_where_that_was_asked_for():
    Path("mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Puts(nn.CrossEntropyLoss):\n"
        "    def forward(self, logits, labels):\n"
        "        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))\n"  # refused on CPUs too
        "        return super().forward(logits, labels)\n"
    )
    words = [*TINY, "loss.name=mine:Puts"]
    assert run(Path.cwd(), *words, "train.epochs=1")[0] == 0
    status, said = run(Path.cwd(), *words, "train.deterministic=true")
    assert status == 1 and "Traceback" not in said, said
    assert "train.deterministic: put_, which this model uses, has no repeatable" in said


def test_a_run_that_diverges_in_numbers_is_told_so_once(train, capfd):
    assert train("optim.lr=100", "train.epochs=4") in (0, 1)
    said = capfd.readouterr().err
    assert said.count("times that of guessing: the run diverges; a lower optim.lr") == 1
    assert train("optim.lr=0.05", "train.epochs=2") == 0
    assert "diverges" not in capfd.readouterr().err


@pytest.mark.parametrize("folder", ["logs", "checkpoints"])
@pytest.mark.parametrize("kind", ["file", "dangling link", "name too long"])
def test_a_folder_that_cannot_be_one_is_refused_in_one_line(train, capfd, folder, kind):
    words = []
    if kind == "file":
        Path(folder).write_text("mine")
    elif kind == "dangling link":
        Path(folder).symlink_to("nowhere/at/all")
    else:
        words = ["run=" + 300 * "a"]
    before = sorted(Path().rglob("*"))
    assert train(*words) == 2
    said = capfd.readouterr().err
    assert "cannot be written: " in said and said.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("key", ["schedule.warmup_epochs=1e308", "schedule.warmup_epochs=1e17"])
def test_a_number_beyond_all_use_is_refused(train, capfd, key):
    assert train(key) == 2
    assert "expected a number of at least 0 and at most 1000000" in capfd.readouterr().err


@pytest.mark.parametrize("process", [0, -1, 10**14, 10**30, True, None, "1", 2.5])
def test_a_process_number_that_is_none_is_nobody_and_gets_no_signal(process, monkeypatch):
    sent = []
    original = os.kill
    monkeypatch.setattr(os, "kill", lambda *to: (sent.append(to), original(*to)))
    Path("logs").mkdir()
    Path("checkpoints").mkdir()
    owner = {"process": process, "machine": platform.node()}
    Path("checkpoints/.run.json").write_text(json.dumps(owner))
    assert not is_running(Path("logs"))
    assert all(number > 1 for number, _ in sent)


def test_an_owner_of_another_machine_that_names_no_process_is_nobody():
    Path("checkpoints").mkdir()
    Path("checkpoints/.run.json").write_text(json.dumps({"machine": "elsewhere"}))
    assert not is_running(Path("logs"))


def test_names_are_data_and_steer_no_terminal(train, capfd):
    names = {"\x1b[31mred": 12, "two\nlines": 12, "\u202etfel": 12}
    write_folder(Path("photos"), names)
    words = ["data.name=folder", "data.root=photos", "data.image_size=16", "data.args={}"]
    assert train(*words, "train.epochs=1", "log.report=true") == 0
    said = capfd.readouterr().err + Path("logs/train.log").read_text(encoding="utf-8")
    assert r"\x1b[31mred" in said and r"two\nlines" in said and r"\u202etfel" in said
    assert not [letter for letter in said if not letter.isprintable() and letter not in "\n\t"]


def test_pictures_with_chinese_names_are_drawn_in_any_locale():
    write_folder(Path("照片"), {"猫": 12, "大狗": 12, "_鸟": 12})
    words = ["data.name=folder", "data.root=照片", "data.image_size=16", "data.args={}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LC_ALL", "C")
        status, output = finish(*TINY, *words, "train.epochs=1", "log.report=true")
    assert status == 0, output
    assert "warning" not in output and "Glyph" not in output
    assert Path("logs/confusion_matrix.png").exists() and Path("logs/curves.png").exists()


def test_few_open_files_are_enough_and_too_few_for_loader_processes_are_told():
    words = [*TINY, "train.epochs=1"]
    process = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10)),
        check=False,
        timeout=100,
    )
    assert process.returncode == 0
    words += ["data.num_workers=3", "data.in_memory=false"]
    for number in (14, 24, 32):
        status, said = run(Path.cwd(), *words, open_files=number)
        assert status == 1, said
        assert said.count("error: ") == 1 and "Traceback" not in said
        assert "fewer data.num_workers need less (ulimit -n" in said
    assert run(Path.cwd(), *words, open_files=80)[0] == 0
