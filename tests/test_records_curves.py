"""ROC and precision-recall curves, the reliability diagram, and charts of which one epoch shot up."""

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, roc_curve

from cnn.metrics import scores
from cnn.records.curves import MAX_CURVES, evaluation_panels
from cnn.records.figures import Curve, Panel, draw_panels


def draw(number, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, number)
    logits = rng.standard_normal((number, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    powers = np.exp(logits)
    return labels, (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def test_the_curves_of_two_classes_are_those_of_the_positive_class():
    labels, said = draw(300, 2)
    roc, recall, _ = evaluation_panels(labels, said, ["well", "ill"])
    (curve,) = roc.curves
    false, hits, _ = roc_curve(labels, said[:, 1], drop_intermediate=False)
    assert np.allclose(curve.xs, false) and np.allclose(curve.ys, hits)
    assert curve.label == f"ill {scores.auc(labels, said):.3f}"
    assert auc(curve.xs, curve.ys) == pytest.approx(scores.auc(labels, said))
    steps = np.diff(recall.curves[0].xs, prepend=0) * recall.curves[0].ys
    assert steps.sum() == pytest.approx(average_precision_score(labels, said[:, 1]), abs=1e-6)
    assert roc.marks == [(said[labels == 0, 1] >= 0.5).mean()]
    assert recall.marks == [(said[labels == 1, 1] >= 0.5).mean()]


def test_of_many_classes_the_worst_and_the_mean_are_shown():
    labels, said = draw(20_000, 12)
    said[labels == 7, 7] /= 4
    roc, recall, _ = evaluation_panels(labels, said, [f"class {n}" for n in range(12)])
    assert len(roc.curves) == len(recall.curves) == MAX_CURVES + 1
    assert roc.curves[0].label.startswith("class 7 ") and roc.curves[-1].label == "mean"
    mean = auc(roc.curves[-1].xs, roc.curves[-1].ys)
    assert mean == pytest.approx(scores.auc(labels, said), abs=5e-3)
    assert max(len(curve.xs) for curve in roc.curves) <= 401


def test_the_reliability_is_the_accuracy_of_each_bin():
    labels, said = draw(3000, 4)
    *_, panel = evaluation_panels(labels, said, list("abcd"))
    curve, ideal = panel.curves
    assert list(ideal.xs) == list(ideal.ys) == [0, 1]
    assert np.abs(np.array(curve.xs) - curve.ys).max() > 0.02
    assert all(0 <= y <= 1 for y in curve.ys) and list(curve.xs) == sorted(curve.xs)


def test_a_test_of_one_class_and_equal_scores_are_drawn():
    for labels in (np.zeros(6, int), np.arange(6) % 2):
        panels = evaluation_panels(labels, np.full((6, 2), 0.5, np.float32), ["a", "b"])
        assert draw_panels(panels).axes[0].get_title() == "ROC"


def test_a_loss_that_shot_up_leaves_the_chart_readable():
    losses = [1.0, 272.0, *np.linspace(0.9, 0.3, 20)]
    epochs = list(range(1, len(losses) + 1))
    axes = draw_panels([Panel("Loss", [Curve("val", epochs, losses)])]).axes[0]
    assert axes.get_ylim()[1] < 3
    assert axes.get_title() == "Loss, cut off: up to 272"
    axes = draw_panels([Panel("Loss", [Curve("val", epochs, [5.0, *losses[2:], 0.2])])]).axes[0]
    assert axes.get_ylim()[1] > 5 and axes.get_title() == "Loss"


def test_early_stopping_says_why(train, capfd):
    assert train("train.epochs=30", "optim.lr=0.5", "train.early_stop_patience=2") == 0
    said = capfd.readouterr().err
    assert "stopped early after epoch " in said
    assert ": no improvement in 2 epochs (best val_loss " in said
    assert "train.early_stop_patience=null goes on to epoch 30" in said
