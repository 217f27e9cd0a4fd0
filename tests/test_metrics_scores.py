"""Metrics are scikit-learn's, to 1e-12, where they are defined, and n/a where they are not."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn import metrics as sk

from cnn.metrics import scores
from cnn.metrics.running import EvaluationMetrics

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N) and probabilities (N, classes): some with ties, absent classes, few images."""
    rng = np.random.default_rng(seed)
    classes, number = int(rng.integers(2, 8)), int(rng.integers(1, 60))
    labels = rng.choice(rng.permutation(classes)[: rng.integers(1, classes + 1)], number)
    raw = rng.random((number, classes))
    if seed % 3 == 0:
        raw = np.round(raw * 3) + 1  # many ties
    if seed % 7 == 0:
        raw[:] = 1.0  # nothing but ties
    return labels, raw / raw.sum(1, keepdims=True)


def same(ours: float | None, theirs: float) -> bool:
    return math.isnan(theirs) if ours is None else ours == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize("seed", range(60))
def test_of_a_confusion_matrix_all_is_as_scikit_learn_says(seed):
    labels, given = draw(seed)
    number, said = given.shape[1], given.argmax(1)
    matrix = scores.confusion(labels, said, number)
    every = list(range(number))
    assert (matrix == sk.confusion_matrix(labels, said, labels=every)).all()
    ours = scores.per_class(matrix)
    options = {"labels": every, "zero_division": np.nan}
    theirs = sk.precision_recall_fscore_support(labels, said, **options)
    for name, values in zip(("precision", "recall", "f1", "support"), theirs):
        np.testing.assert_allclose(ours[name], values, rtol=1e-12, err_msg=name)
    pairs = sk.multilabel_confusion_matrix(labels, said, labels=every)
    for one, (tn, fp) in zip(ours["specificity"], pairs[:, 0]):
        assert same(None if math.isnan(one) else one, tn / (tn + fp) if tn + fp else math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of classes that are absent
        assert same(scores.macro(ours["recall"]), sk.balanced_accuracy_score(labels, said))
        for name, function in (("f1", sk.f1_score), ("precision", sk.precision_score)):
            macro = function(labels, said, average="macro", **options)
            assert same(scores.macro(ours[name]), macro)
            weighted = function(labels, said, average="weighted", **options)
            if np.isnan(ours[name][ours["support"] > 0]).all():
                weighted = math.nan  # scikit-learn says 0 where there is nothing to weigh
            assert same(scores.weighted(ours[name], ours["support"]), weighted)


@pytest.mark.parametrize("seed", range(60))
def test_of_scores_all_is_as_scikit_learn_says(seed):
    labels, given = draw(seed)
    number = given.shape[1]
    for label, area in enumerate(scores.auc_per_class(labels, given)):
        if 0 < (labels == label).sum() < len(labels):
            assert same(area, sk.roc_auc_score(labels == label, given[:, label]))
        else:
            assert math.isnan(area)
    if set(labels) == set(range(number)):
        positive = given[:, 1] if number == 2 else given
        theirs = sk.roc_auc_score(labels, positive, multi_class="ovr", average="macro")
        assert same(scores.auc(labels, given), theirs)
    theirs = sk.log_loss(labels, given, labels=list(range(number)))
    assert same(scores.log_loss(labels, given), theirs)


def test_log_loss_of_a_certain_mistake_is_scikit_learns():
    labels, given = np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert same(scores.log_loss(labels, given), sk.log_loss(labels, given))


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(5)
    labels, given = rng.integers(0, 4, 500), rng.dirichlet(np.ones(4), 500)
    given[:15] = np.eye(4)[rng.integers(0, 4, 15)]  # wholly sure
    sure, right = given.max(1), given.argmax(1) == labels
    expected = 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15):
        inside = (sure > low) & (sure <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert scores.calibration_error(labels, given) == pytest.approx(expected, **CLOSE)


def test_what_is_undefined_is_none_and_not_0():
    one_class = np.zeros(5, int)
    given = np.full((5, 2), 0.5)
    assert scores.auc(one_class, given) is None
    matrix = scores.confusion(one_class, one_class, 2)
    found = scores.from_confusion_matrix(matrix)
    assert found["sensitivity"] is None and found["specificity"] == 1
    assert np.isnan(scores.per_class(matrix)["precision"][1])
    nothing = scores.from_confusion_matrix(np.zeros((2, 2), int))
    assert set(nothing.values()) == {None}
    assert scores.from_probabilities(one_class, np.full((5, 2), np.nan)) == dict.fromkeys(
        scores.FROM_PROBABILITIES
    )
    assert scores.wilson(0, 0) is None and scores.with_interval(None, None) == "n/a"


def test_scores_in_any_layout_are_left_as_they_are():
    labels, given = draw(4)
    given = np.asfortranarray(given)
    before = given.copy()
    scores.auc(labels, given)
    assert (given == before).all()


@pytest.mark.parametrize("correct, count", [(0, 1), (1, 1), (0, 90), (88, 90), (874, 899), (5, 10)])
def test_the_interval_of_an_accuracy_is_wilsons(correct, count):
    theirs = binomtest(correct, count).proportion_ci(0.95, "wilson")
    assert scores.wilson(correct, count) == pytest.approx((theirs.low, theirs.high), **CLOSE)


def test_top_5_is_not_spoken_of_among_few_classes():
    assert "top5_acc" not in scores.result_metrics(10)
    assert "top5_acc" in scores.result_metrics(100)


@pytest.mark.parametrize("classes, batches", [(2, [7, 5]), (3, [12]), (25, [30, 30, 1])])
def test_an_outcome_added_batch_by_batch_is_that_of_the_whole(classes, batches):
    torch.manual_seed(classes)
    evaluation_metrics = EvaluationMetrics(
        torch.device("cpu"), classes, scores.result_metrics(classes)
    )
    logits = [torch.randn(number, classes) for number in batches]
    labels = [torch.randint(classes, (number,)) for number in batches]
    for one, other in zip(logits, labels):
        evaluation_metrics.add(torch.nn.functional.cross_entropy(one, other), one, other)
    whole, truth = torch.cat(logits), torch.cat(labels).numpy()
    said, given = whole.argmax(1).numpy(), whole.softmax(1).numpy()
    found = evaluation_metrics.compute()
    assert found["acc"] == pytest.approx(sk.accuracy_score(truth, said), **CLOSE)
    assert same(found["auc"], scores.auc(truth, given))
    assert (evaluation_metrics.confusion().numpy() == scores.confusion(truth, said, classes)).all()
    if classes == 25:
        top = sk.top_k_accuracy_score(truth, whole.numpy(), k=5, labels=range(classes))
        assert same(found["top5_acc"], top)
    if classes == 2:
        assert same(found["sensitivity"], sk.recall_score(truth, said))
        assert same(found["specificity"], sk.recall_score(truth, said, pos_label=0))
    kept = evaluation_metrics.predictions()
    assert (kept["prediction"].numpy() == said).all()
    np.testing.assert_array_equal(kept["probability"].numpy(), given.max(1))


def test_only_what_is_asked_for_is_kept():
    evaluation_metrics = EvaluationMetrics(
        torch.device("cpu"), 3, scores.epoch_metrics(3, "val_acc")
    )
    evaluation_metrics.add(torch.tensor(1.0), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert list(evaluation_metrics.compute()) == ["loss", "acc", "balanced_acc", "f1"]
    (batch,) = evaluation_metrics._batches
    assert "probabilities" not in batch and "is_in_top" not in batch
