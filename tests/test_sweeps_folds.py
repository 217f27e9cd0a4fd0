"""Cross-validation: sweep.py with a grid over data.fold."""

import csv
import json
import signal
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score
from sweeping import Sweeping

import sweep as script
from cnn.config import DataConfig
from cnn.errors import Refused
from cnn.metrics.intervals import share
from cnn.sweeps.settings import load_sweep

NUM_FOLDS = 3
WORDS = ("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8")
SETTINGS = (*WORDS, "data.group='p\\d+'", "data.positive=ill", "optim.lr=0.01")


def read(path):
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def file():
    """A cross-validation of 18 patients, of whom each has four pictures."""
    for patient in range(18):
        name = ("ill", "well")[patient % 2]
        Path("photos", name).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            noise = np.random.default_rng([patient, number]).normal(
                90 + 20 * (patient % 2), 40, 192
            )
            picture = noise.clip(0, 255).astype("u1").reshape(8, 8, 3)
            Image.fromarray(picture).save(f"photos/{name}/p{patient:02}_{number}.png")
    Path("cv.yaml").write_text(
        f"config: {TINY[1]}\nsettings: {{data.folds: {NUM_FOLDS}}}\nsearch: grid\n"
        f"space: {{data.fold: {list(range(NUM_FOLDS))}}}\n"
    )
    return "cv.yaml"


def test_every_picture_is_predicted_once_and_the_figures_are_of_the_predictions(file, capfd):
    assert script.main([file, *SETTINGS]) == 0
    said = capfd.readouterr().err
    rows = read("logs/sweeps/cv/predictions_oof.csv")
    assert sorted(row["image"] for row in rows) == sorted(map(str, Path("photos").glob("*/*.png")))
    folds: dict[str, set] = {}
    areas = []
    for fold in range(NUM_FOLDS):
        tested = [row for row in rows if row["data.fold"] == str(fold)]
        labels = [row["label"] == "ill" for row in tested]
        scores = np.array([row["p_ill"] for row in tested], np.float32)
        areas.append(roc_auc_score(labels, scores))
        result = json.loads(Path(f"logs/cv_000{fold}/result.json").read_text())["test"]
        assert result["test_auc"] == pytest.approx(areas[-1], abs=1e-15)
        predictions = [row["prediction"] == "ill" for row in tested]
        assert result["test_acc"] == accuracy_score(labels, predictions)
        assert result["test_sensitivity"] == recall_score(labels, predictions)
        for row in tested:
            folds.setdefault(row["group"], set()).add(fold)
        trained = {
            r["group"] for r in read(f"logs/cv_000{fold}/division.csv") if r["split"] != "test"
        }
        assert not trained & {row["group"] for row in tested}
    assert len(folds) == 18 and all(len(found) == 1 for found in folds.values())

    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert f"{np.mean(areas):.4f} ± {statistics.stdev(areas):.4f}" in lines["auc"]
    hits = np.array([row["label"] == row["prediction"] for row in rows])
    groups = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    low, high = share(hits, np.ones(len(hits), bool), groups)
    assert f"{hits.mean():.4f} (95 %: {low:.4f} to {high:.4f})" in lines["acc"]
    assert "predictions_oof.csv" in said and not Path("configs/best_hparams").exists()

    Path("logs/cv_0001/predictions_test.csv").unlink()
    assert script.main([file, *SETTINGS]) == 1
    assert "logs/cv_0001: expected a fold that is tested" in capfd.readouterr().err


def test_each_fold_has_a_threshold_of_its_validation(file, capfd):
    words = [file, *SETTINGS, "data.val_fraction=0.3"]
    assert script.main([*words, "--sensitivity", "0.9"]) == 0
    said = capfd.readouterr().err
    rows = read("logs/sweeps/cv/predictions_oof.csv")
    for fold in range(NUM_FOLDS):
        val = read(f"logs/cv_000{fold}/predictions_val.csv")
        ill = sorted(float(row["p_ill"]) for row in val if row["label"] == "ill")
        (threshold,) = {float(r["threshold"]) for r in rows if r["data.fold"] == str(fold)}
        assert np.mean(np.array(ill) >= threshold) >= 0.9
    found = [float(row["p_ill"]) >= float(row["threshold"]) for row in rows]
    labels = [row["label"] == "ill" for row in rows]
    groups = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    low, high = share(np.array(found), np.array(labels), groups)
    after = said.split("threshold for sensitivity 0.9 on val")[1]
    value = recall_score(labels, found)
    lines = {line.split()[0]: line for line in after.splitlines() if line.startswith("  ")}
    assert f"{value:.4f} (95 %: {low:.4f} to {high:.4f})" in lines["sensitivity"]

    assert script.main(words) == 0  # without: no threshold in the file
    assert "threshold" not in read("logs/sweeps/cv/predictions_oof.csv")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sensitivity", "1"], "--sensitivity: expected a share above 0 and below 1, got 1"),
        (["--specificity", "0.9"], "--specificity: is for a cross-validation"),
        (["--specificity", "0.9", "--sensitivity", "0.9"], "not allowed with"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(words, message, capfd):
    assert script.main([str(ROOT / "configs/sweep.yaml"), *words]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.soak
def test_a_cross_validation_that_is_killed_and_resumed_is_as_the_unbroken_one(file):
    words = (file, *SETTINGS, "train.epochs=20")
    assert script.main([*words, "name=whole"]) == 0
    broken = Sweeping(*words, "name=broken")
    broken.wait_for_epochs(3, "broken")
    broken.kill(signal.SIGKILL)
    assert script.main([*words, "name=broken"]) == 0
    one, other = (
        Path(f"logs/sweeps/{name}/predictions_oof.csv").read_bytes() for name in ("whole", "broken")
    )
    assert one == other


def test_the_file_shipped_is_a_cross_validation_of_a_folder():
    sweep = load_sweep(ROOT / "configs/folds.yaml", ["data.root=photos"])
    assert sweep.is_cross_validation and sweep.trials == sweep.base.data.folds == 5
    assert sweep.base.data.name == "folder" and DataConfig().folds is None
    for name in ("sweep", "folds"):
        words = ["data.fold=0", "data.folds=2"] if name == "sweep" else []
        assert load_sweep(ROOT / f"configs/{name}.yaml", words).is_cross_validation == (
            name == "folds"
        )


@pytest.mark.parametrize("words", [[], ["space={data.fold: [0, 1]}"]])
@pytest.mark.parametrize("number", [2, 3, 10])
def test_all_folds_are_tried_however_many_are_written(file, words, number):
    sweep = load_sweep(Path(file), [*SETTINGS, *words, f"data.folds={number}"])
    assert sweep.trials == number and sweep.combination(number - 1) == {"data.fold": number - 1}


def test_folds_of_unknown_number_are_refused(file):
    with pytest.raises(Refused, match="data.fold: needs data.folds"):
        load_sweep(Path(file), [*SETTINGS, "data.folds=null"])
