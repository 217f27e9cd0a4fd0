"""What a run's records hold: columns for the classes there are, and nothing where nothing is known."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, history
from PIL import Image
from test_training_runs import move_to, write_folder

from cnn.config import load_config
from cnn.records import find_lr
from cnn.training.setup import build_run
from cnn.utils.checkpoint import load_checkpoint

TWO = ["data.args={num_images: 70, num_test: 20, num_classes: 2, image_size: 8, noise: 200}"]


def test_of_two_classes_the_history_has_auc_sensitivity_and_specificity(train):
    assert train(*TWO, "checkpoint.monitor=val_auc", "train.epochs=3") == 0
    rows = history(".")
    assert list(rows[0])[-5:] == [
        *("val_balanced_acc", "val_f1", "val_auc", "val_sensitivity", "val_specificity")
    ]
    best = load_checkpoint(Path("checkpoints/best.pth"))["best"]
    assert best["metric"] == "val_auc"
    assert best["value"] == max(float(row["val_auc"]) for row in rows)
    for row in rows:
        both = (float(row["val_sensitivity"]) + float(row["val_specificity"])) / 2
        assert both == pytest.approx(float(row["val_balanced_acc"]))
    log = Path("logs/train.log").read_text()
    assert log.count(" auc 0.") + log.count(" auc 1.") == 3


@pytest.mark.parametrize("monitor", ["val_balanced_acc", "val_f1", "val_auc", "val_log_loss"])
def test_the_best_epoch_can_be_looked_for_by_any_metric(train, monitor):
    assert train(f"checkpoint.monitor={monitor}") == 0
    assert load_checkpoint(Path("checkpoints/last.pth"))["best"]["metric"] == monitor
    assert all(row[monitor] for row in history("."))


def test_a_metric_that_these_data_leave_undefined_is_refused(train, capfd):
    assert train("checkpoint.monitor=val_sensitivity") == 2
    assert "val_sensitivity is for two classes, there are 3" in capfd.readouterr().err
    write_folder(Path("photos/train"), {"cat": 6, "dog": 6})
    write_folder(Path("photos/val"), {"cat": 3})
    words = ["data.name=folder", "data.root=photos", "data.args={}", "checkpoint.monitor=val_auc"]
    assert train(*words) == 2
    said = capfd.readouterr().err
    assert "val_auc is undefined without validation images of dog" in said


def test_what_is_undefined_is_an_empty_cell_and_n_a(train):
    write_folder(Path("photos/train"), {"cat": 6, "dog": 6})
    write_folder(Path("photos/val"), {"cat": 3})
    words = ["data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8"]
    assert train(*words, "log.report=true") == 0
    assert {row["val_auc"] for row in history(".")} == {""}
    assert " auc n/a" in Path("logs/train.log").read_text()
    assert train("--resume", "train.epochs=3") == 0
    assert {row["val_auc"] for row in history(".")} == {""}


def test_groups_have_their_learning_rates_in_the_history(train):
    assert train("optim.groups=[{match: classifier, lr_scale: 0.1}]") == 0
    rates = [(float(row["lr"]), float(row["lr_x0.1"])) for row in history(".")]
    assert rates == [(0.05, pytest.approx(0.005))] * 2


def test_predictions_val_csv_is_the_best_epochs(train):
    assert train("train.epochs=4", "optim.lr=0.5") == 0
    with open("logs/predictions_val.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = load_checkpoint(Path("checkpoints/best.pth"))
    right = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert right == pytest.approx(best["history"][-1]["val_acc"])
    assert best["epoch"] != 4  # so that it is not simply the last
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)


def test_the_test_line_has_an_interval_and_result_json_the_figures(train, capfd):
    assert train() == 0
    result = json.loads(Path("logs/result.json").read_text())
    low, high = capfd.readouterr().err.split("(95 %: ")[1].split(")")[0].split(" to ")
    assert float(low) <= result["test"]["test_acc"] <= float(high)
    assert result["images"] == {"train": 64, "val": 6, "test": 20}


def test_records_are_brought_back_to_what_the_checkpoint_knows(train):
    assert train("train.epochs=3", "checkpoint.every_epochs=1") == 0
    whole = move_to("whole")
    Path("checkpoints").mkdir()
    Path("checkpoints/last.pth").write_bytes((whole / "checkpoints/epoch_001.pth").read_bytes())
    Path("checkpoints/best.pth").write_bytes((whole / "checkpoints/epoch_001.pth").read_bytes())
    Path("logs").mkdir()
    for name in ("history.csv", "predictions_val.csv", "result.json"):
        Path("logs", name).write_text("torn, or of a later epoch")
    assert train("--resume") == 0
    assert_same_run(whole, ".")
    for name in ("predictions_val.csv", "result.json"):
        assert Path("logs", name).read_bytes() == (whole / "logs" / name).read_bytes()


def test_records_that_were_lost_come_back_with_a_resume(train):
    assert train("log.report=true") == 0
    names = ("predictions_val.csv", "result.json", "confusion_matrix.png")
    whole = {name: Path("logs", name).read_bytes() for name in names}
    for name in (*names, "report.html"):
        Path("logs", name).unlink()
    assert train("--resume") == 0
    assert {name: Path("logs", name).read_bytes() for name in names} == whole
    assert "Validation, 6 images" in Path("logs/report.html").read_text(encoding="utf-8")


def test_a_checkpoint_from_before_these_records_resumes(train):
    assert train("checkpoint.monitor=val_acc") == 0
    path = Path("checkpoints/last.pth")
    content = torch.load(path, weights_only=True)
    for key in ("predictions", "group_lrs", "outline"):
        del content[key]
    for key in ("report", "tensorboard"):
        del content["config"]["log"][key]
    for row in content["history"]:
        del row["val_f1"], row["val_balanced_acc"]
    torch.save(content, path)
    assert train("--resume", "train.epochs=3") == 0
    assert [row["val_f1"] == "" for row in history(".")] == [True, True, False]


def test_without_matplotlib_and_tensorboard_a_run_says_what_it_leaves_out(
    train, capfd, monkeypatch
):
    for name in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train("log.report=true", "log.tensorboard=true") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    left_out = "report.html, curves.png, confusion_matrix.png, logs/tensorboard"
    assert said == [f"left out: {left_out} (pip install matplotlib tensorboard)"]
    assert not Path("logs/report.html").exists() and not Path("logs/tensorboard").exists()
    assert train("--find-lr") == 0


def test_a_range_test_is_of_optim_lr_where_parts_have_other_rates(monkeypatch):
    cfg, _ = load_config(ROOT / TINY[1], ["optim.groups=[{match: ., lr_scale: 0.1}]"])
    used, endless_steps = [], find_lr.endless_steps

    def remember(run):
        steps = endless_steps(run)
        while True:
            used.append(run.state.optimizer.param_groups[0]["lr"])
            yield next(steps)

    monkeypatch.setattr(find_lr, "endless_steps", remember)
    lrs, _ = find_lr.train_with_rising_lr(build_run(cfg))
    assert len(lrs) > 50 and used[: len(lrs)] == pytest.approx([lr / 10 for lr in lrs])


def test_a_range_test_suggests_a_learning_rate_and_touches_nothing_of_the_run(train, capfd):
    assert train() == 0
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert train("--find-lr") == 0
    assert "try: python train.py optim.lr=" in capfd.readouterr().err
    after = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    picture = Path("logs/find_lr.png")
    with Image.open(picture) as image:
        assert image.size[0] > 300
    left_out = {picture, *Path("cache/matplotlib").glob("*")}  # matplotlib's list of fonts
    assert before == {path: data for path, data in after.items() if path not in left_out}
