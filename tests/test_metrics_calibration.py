"""Temperature scaling: the function, and a run that fits the temperature before its test."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import export
from cnn.datasets import synthetic
from cnn.inference import load
from cnn.inference.trained_model import load_trained_model
from cnn.metrics import scores
from cnn.metrics.calibration import fit_temperature, scaled
from cnn.utils.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import assert_same_run, finish

IMAGES = {"num_images": 300, "num_test": 60, "num_classes": 3, "image_size": 8, "noise": 20}
SMOOTHED = (f"data.args={IMAGES}", "data.val_fraction=0.3", "loss.label_smoothing=0.2")


def draw(number, temperature, seed=0, num_classes=5):
    """Labels, and probabilities whose logits were multiplied by a temperature."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((number, num_classes))
    right = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(num_classes, p=row) for row in right])
    return labels, scaled(right, 1 / temperature)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_temperature_that_spoilt_probabilities_is_found(temperature):
    labels, said = draw(4000, temperature)
    found = fit_temperature(labels, said)
    assert found == pytest.approx(temperature, rel=0.1)
    better = scaled(said, found)
    assert (better.argmax(1) == said.argmax(1)).all()
    assert np.allclose(better.sum(1), 1)
    assert scores.calibration_error(labels, better) < 0.02 < scores.calibration_error(labels, said)


def test_good_probabilities_stay_as_they_are():
    kept = [fit_temperature(*draw(number, 1.0, seed)) for number in (48, 500) for seed in range(50)]
    assert sum(found != 1 for found in kept) <= 2
    said = draw(50, 1.0)[1]
    assert scaled(said, 1.0) is said


def test_few_images_do_no_harm():
    labels, said = draw(5000, 1.15)
    losses = []
    for seed in range(50):
        some = np.random.default_rng(seed).permutation(5000)[:48]
        better = scaled(said, fit_temperature(labels[some], said[some]))
        losses.append(scores.log_loss(labels, better))
    assert np.mean(losses) <= scores.log_loss(labels, said) + 1e-3


def test_images_without_a_mistake_do_not_ask_for_certainty():
    labels = np.arange(60) % 2
    said = np.where(np.eye(2)[labels] == 1, 0.9, 0.1)
    assert 0.2 < fit_temperature(labels, said) < 0.8
    certain = np.eye(2, dtype=np.float32)[labels]  # probabilities of 0 and 1
    assert np.isfinite(scaled(certain, fit_temperature(labels, certain))).all()


def test_the_images_of_a_group_count_once():
    labels = np.arange(60) % 2
    said = np.where(np.eye(2)[labels] == 1, 0.6, 0.4)  # never wrong, and not sure
    assert fit_temperature(labels, said) < 1
    assert fit_temperature(labels, said, np.arange(60) % 30) < 1
    assert fit_temperature(labels, said, np.arange(60) % 4) == 1


def rows(name):
    return list(csv.DictReader(Path("logs", name).read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def smoothed(train):
    assert train(*SMOOTHED, "optim.lr=0.1", "train.epochs=4") == 0


def test_a_run_fits_its_temperature_before_the_test(smoothed, capsys):
    test = json.loads(Path("logs/result.json").read_text())["test"]
    assert test["test_ece"] < test["test_ece_before"]
    assert test["test_log_loss"] < test["test_log_loss_before"]
    best = load_checkpoint(Path("checkpoints/best.pth"))
    assert best["temperature"] == load_checkpoint(Path("checkpoints/last.pth"))["temperature"] < 1
    assert (
        f"temperature {best['temperature']:.3f} (fitted on val): ece"
        in Path("logs/train.log").read_text()
    )
    for split in ("val", "test"):
        assert evaluate.main(["--split", split, "--json", f"{split}.json"]) == 0
        assert "the same figures, to the last digit" in capsys.readouterr().out
    said = json.loads(Path("test.json").read_text())["metrics"]
    assert said == test


def test_the_tables_are_what_the_figures_are_computed_from(smoothed):
    test = json.loads(Path("logs/result.json").read_text())["test"]
    table = rows("predictions_test.csv")
    classes = [name.removeprefix("p_") for name in table[0] if name.startswith("p_")]
    labels = np.array([classes.index(row["label"]) for row in table])
    said = np.array([[row[f"p_{name}"] for name in classes] for row in table], np.float32)
    assert [classes[n] for n in said.argmax(1)] == [row["prediction"] for row in table]
    assert [max(row) for row in said] == [np.float32(row["probability"]) for row in table]
    for name, value in scores.from_probabilities(labels, said).items():
        assert test[f"test_{name}"] == value
    assert test["test_acc"] == (said.argmax(1) == labels).mean()


def test_a_prediction_and_an_export_have_the_temperature(smoothed):
    predictor = load("checkpoints/best.pth")
    splits, _ = synthetic.load(**IMAGES)
    table = {row["image"]: row for row in rows("predictions_val.csv")}
    for name in list(table)[:5]:
        index = int(name.partition("[")[2].rstrip("]"))
        picture = splits["train"].pixels[index].numpy()
        found = predictor(picture)
        assert found.classes[0] == table[name]["prediction"]
        assert found.probabilities[0] == pytest.approx(float(table[name]["probability"]), abs=1e-6)
    assert export.main([]) == 0
    module = torch.export.load("checkpoints/best.pt2").module()
    with torch.no_grad():
        logits = module(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
    assert logits.softmax(1).max().item() == pytest.approx(found.probabilities[0], abs=1e-5)


def test_a_stop_before_the_temperature_changes_nothing(smoothed, train):
    for folder in ("checkpoints", "logs"):
        shutil.copytree(folder, f"whole/{folder}")
    for name in ("last.pth", "best.pth"):
        content = load_checkpoint(Path("checkpoints", name))
        content.update(test=None, temperature=None)
        content["predictions"].pop("test", None)
        save_checkpoint(content | {"threshold": 0.3}, Path("checkpoints", name))
    assert train("--resume") == 0
    best = load_checkpoint(Path("checkpoints/best.pth"))
    assert best.pop("threshold") is None, "it was chosen for other probabilities"
    save_checkpoint(best, Path("checkpoints/best.pth"))
    assert_same_run("whole", ".")
    for name in ("result.json", "predictions_val.csv", "predictions_test.csv"):
        assert Path("logs", name).read_bytes() == Path("whole/logs", name).read_bytes()


def test_more_epochs_fit_another_temperature(smoothed, train):
    first = load_checkpoint(Path("checkpoints/last.pth"))["temperature"]
    assert train("--resume", "train.epochs=5", "loss.label_smoothing=0.3") == 0
    last = load_checkpoint(Path("checkpoints/last.pth"))
    assert last["temperature"] is not None and last["epoch"] == 5
    assert (last["temperature"] == first) == (last["best"]["epoch"] <= 4)


def test_other_weights_than_those_of_the_best_epoch_have_no_temperature(smoothed):
    content = load_checkpoint(Path("checkpoints/last.pth"))
    assert content["temperature"] != 1
    assert load_trained_model(Path("checkpoints/best.pth")).temperature == content["temperature"]
    save_checkpoint(content | {"temperature": None}, Path("checkpoints/kept.pth"))
    assert load_trained_model(Path("checkpoints/kept.pth")).temperature == 1
    content["best"] |= {"epoch": 1, "value": content["history"][0]["val_loss"]}
    content["early_stop"]["waited"] = content["epoch"] - 1
    save_checkpoint(content, Path("checkpoints/last.pth"))
    assert load_trained_model(Path("checkpoints/last.pth")).temperature == 1


def test_a_temperature_that_is_none_is_refused(smoothed):
    path = Path("checkpoints/best.pth")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"temperature": 0.0}, path)
    status, said = finish("--resume", str(path), "train.epochs=5")
    assert status == 2 and "temperature" in said and "Traceback" not in said
