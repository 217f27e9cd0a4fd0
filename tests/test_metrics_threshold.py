"""The threshold for the positive class: how it is chosen, and what uses it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

import evaluate
import export
import predict
from cnn.inference import load
from cnn.metrics import threshold as threshold_module
from cnn.metrics.threshold import at_threshold, choose_threshold
from cnn.utils.checkpoint import load_checkpoint

WORDS = ("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8")
SHARES = ("data.val_fraction=0.3", "data.test_fraction=0.3", "optim.lr=0.02", "train.epochs=3")


def draw(rng, number, prevalence=0.5, area=0.9):
    labels = (rng.random(number) < prevalence).astype(int)
    values = rng.standard_normal(number) + norm.ppf(area) * 2**0.5 * labels
    return labels, 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("name", ["sensitivity", "specificity"])
def test_it_reaches_what_is_wanted_with_the_best_of_the_other(name, wanted):
    labels, scores = draw(np.random.default_rng(1), 300)
    threshold = choose_threshold(labels, scores, **{name: wanted})
    other = {"sensitivity": "specificity", "specificity": "sensitivity"}[name]
    found = at_threshold(labels, scores, threshold)
    assert found[name][0] >= wanted
    assert np.abs(scores - threshold).min() > 1e-9
    for candidate in scores:
        figures = at_threshold(labels, scores, candidate)
        if figures[name][0] >= wanted:
            assert figures[other][0] <= found[other][0]


def test_equal_scores_are_not_divided():
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1])
    assert choose_threshold(labels, scores, sensitivity=0.5) == pytest.approx(0.3)
    assert choose_threshold(labels, scores, specificity=0.75) == pytest.approx(0.7)
    assert choose_threshold(labels, scores, sensitivity=0.25) == pytest.approx(0.7)


@pytest.mark.parametrize("wanted", [0.5, 0.95, 0.99])
def test_neighbours_among_numbers_are_told_apart(wanted):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 200)
    near = (1 - 6e-8 * np.arange(200)).astype(np.float32)  # with many equal ones
    for given in (near, rng.permutation(near), np.nextafter(near, 0, dtype=np.float32)):
        for name in ("sensitivity", "specificity"):
            threshold = choose_threshold(labels, given, **{name: wanted})
            assert at_threshold(labels, given, threshold)[name][0] >= wanted or threshold == 1


def test_a_threshold_of_0_or_1_is_refused(trained, monkeypatch, capsys):
    before = Path("checkpoints/best.pth").read_bytes()
    monkeypatch.setattr(threshold_module, "choose_threshold", lambda *_, **__: at)
    for at in (0.0, 1.0):
        assert evaluate.main(["--sensitivity", "0.9", "--save-threshold"]) == 2
        assert f"only a threshold of {at:g} would reach it" in capsys.readouterr().err
    assert Path("checkpoints/best.pth").read_bytes() == before


def test_the_figures_are_shares():
    labels, scores = draw(np.random.default_rng(2), 200, 0.3)
    said, found = scores >= 0.6, at_threshold(labels, scores, 0.6)
    assert found["sensitivity"][0] == said[labels == 1].mean()
    assert found["specificity"][0] == 1 - said[labels == 0].mean()
    assert found["ppv"][0] == labels[said].mean() and found["npv"][0] == 1 - labels[~said].mean()
    own = at_threshold(labels, scores, 0.6, prevalence=labels.mean())
    for name in found:
        assert own[name][0] == pytest.approx(found[name][0])
        low, high = own[name][1]
        assert low < own[name][0] < high
    rare = at_threshold(labels, scores, 0.6, prevalence=0.01)
    assert rare["ppv"][0] < 0.2 and rare["npv"][0] > 0.99
    nobody = at_threshold(labels, scores, 2.0)
    assert nobody["ppv"] == (None, None) and nobody["sensitivity"][0] == 0


@pytest.mark.parametrize("prevalence", [0.1, 0.5])
def test_the_intervals_of_a_test_cover_the_truth(prevalence):
    rng, shift = np.random.default_rng(3), norm.ppf(0.9) * 2**0.5
    covered = {"wanted": 0, "sensitivity": 0, "ppv": 0}
    for _ in range(400):
        threshold = choose_threshold(*draw(rng, 5000, prevalence), sensitivity=0.9)
        found = at_threshold(*draw(rng, 500, prevalence), threshold, prevalence=0.05)
        at = np.log(threshold / (1 - threshold))
        hits, false = norm.sf(at - shift), norm.sf(at)
        truth = {"sensitivity": hits, "ppv": 0.05 * hits / (0.05 * hits + 0.95 * false)}
        low, high = found["sensitivity"][1]
        covered["wanted"] += low <= 0.9 <= high
        for name, value in truth.items():
            covered[name] += found[name][1][0] <= value <= found[name][1][1]
    assert min(covered.values()) / 400 >= 0.91, covered


def predictions():
    text = Path("logs/predictions_test.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def trained(train):
    for name, shade in (("ill", 90), ("well", 110)):
        Path("photos", name).mkdir(parents=True)
        for i in range(60):
            noise = np.random.default_rng([shade, i]).normal(shade, 60, (8, 8, 3))
            shifted = noise + np.random.default_rng([i, shade]).normal(0, 25)
            Image.fromarray(shifted.clip(0, 255).astype("u1")).save(f"photos/{name}/{i:02}.png")
    assert train(*WORDS, *SHARES, "data.positive=ill") == 0


def test_evaluate_chooses_on_val_and_reports_the_test(trained, capsys):
    before = Path("checkpoints/best.pth").read_bytes()
    words = ["--sensitivity", "0.95", "--prevalence", "0.02", "--json", "point.json"]
    assert evaluate.main(words) == 0
    out = capsys.readouterr().out
    point = json.loads(Path("point.json").read_text())["operating_point"]
    assert point["chosen"] == "sensitivity 0.95 on val" and point["val_sensitivity"] >= 0.95
    assert f"with a threshold: ill from {point['threshold']:.4f} on; ppv and npv at" in out
    rows = predictions()
    said = {row["image"]: float(row["p_ill"]) >= point["threshold"] for row in rows}
    hits = [said[row["image"]] for row in rows if row["label"] == "ill"]
    assert point["test_sensitivity"] == np.mean(hits)
    low, high = point["test_sensitivity_95"]
    assert low < point["test_sensitivity"] <= high
    assert Path("checkpoints/best.pth").read_bytes() == before
    assert evaluate.main(["--split", "val", "--specificity", "0.9", "--json", "point.json"]) == 0
    point = json.loads(Path("point.json").read_text())["operating_point"]
    assert point["val_specificity"] >= 0.9 and "test_specificity" not in point


@pytest.mark.parametrize("wanted", ["0.8", "0.3"])
def test_a_saved_threshold_is_used_by_all(trained, train, capsys, wanted):
    before = load_checkpoint(Path("checkpoints/best.pth"))
    assert evaluate.main(["--sensitivity", wanted, "--save-threshold"]) == 0
    saved = load_checkpoint(Path("checkpoints/best.pth"))
    threshold = saved["threshold"]
    assert all(
        torch.equal(saved["model_state_dict"][k], v) for k, v in before["model_state_dict"].items()
    )
    assert {k for k in saved if str(saved[k]) != str(before.get(k))} <= {"threshold", "structure"}
    capsys.readouterr()
    assert evaluate.main(["--json", "after.json"]) == 0
    assert f"positive: ill from probability {threshold:.4f} on" in capsys.readouterr().err
    point = json.loads(Path("after.json").read_text())["operating_point"]
    rows = predictions()
    expected = ["ill" if float(row["p_ill"]) >= threshold else "well" for row in rows]
    assert point["test_sensitivity"] == np.mean(
        [said == "ill" for said, row in zip(expected, rows) if row["label"] == "ill"]
    )
    predictor = load("checkpoints/best.pth")
    found = predictor([row["image"] for row in rows])
    assert [prediction.classes[0] for prediction in found] == expected
    assert len({prediction.classes[0] for prediction in found}) == 2
    assert predictor([rows[0]["image"]], top=1)[0].classes == expected[:1]
    assert predict.main(["photos/ill", "--csv", "said.csv"]) == 0
    assert "from probability" in capsys.readouterr().err

    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime

    assert export.main(["--format", "onnx"]) == 0
    facts = {p.key: p.value for p in onnx.load("checkpoints/best.onnx").metadata_props}
    assert json.loads(facts["threshold"]) == threshold and json.loads(facts["classes"])[1] == "ill"
    session = onnxruntime.InferenceSession("checkpoints/best.onnx")
    pictures = [np.asarray(Image.open(row["image"]), np.float32).transpose(2, 0, 1) for row in rows]
    logits = session.run(["logits"], {"images": np.stack(pictures) / 255})[0]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert ["ill" if share >= threshold else "well" for share in shares[:, 1]] == expected
    assert train("--resume", "checkpoints/best.pth", "train.epochs=4") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sensitivity", "1.5"], "--sensitivity: expected a share above 0 and below 1, got 1.5"),
        (["--save-threshold"], "--save-threshold: expected --sensitivity X or"),
        (["--sensitivity", "0.9", "--specificity", "0.9"], "not allowed with"),
        (["--prevalence", "0.5"], "--prevalence: is for a threshold"),
        (["--sensitivity", "0.9", "data.root=other"], "chosen on the validation of the training"),
    ],
)
def test_what_cannot_be_is_refused(trained, words, message, capsys):
    Path("other").symlink_to("photos")
    Image.new("RGB", (8, 8)).save("photos/ill/another.png")
    if "data.root=other" not in words:
        Path("photos/ill/another.png").unlink()
    assert evaluate.main(words) == 2
    assert message in capsys.readouterr().err


def test_more_classes_have_no_threshold(train, capsys):
    assert train() == 0
    assert evaluate.main(["--specificity", "0.9"]) == 2
    assert "--specificity: is for two classes, got 3" in capsys.readouterr().err
