"""95 % intervals: their coverage in simulations, with and without groups, and known values."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t

from cnn.metrics import intervals as module
from cnn.metrics import scores
from cnn.metrics.intervals import auc_interval, intervals, share

NUM_SETS = 400
LEAST_COVERAGE = 0.92  # of 400 sets, where the interval covers 95 %: three standard errors


def draw(rng, number, prevalence, area, size=1, of_group=False):
    """Labels, scores with a given area under the ROC curve, and groups with correlation 0.5."""
    groups = np.repeat(np.arange(number // size), size)
    sick = rng.random(number // size if of_group else number) < prevalence
    labels = (sick[groups] if of_group else sick).astype(int)
    shared = math.sqrt(0.5) if size > 1 else 0
    noise = shared * rng.standard_normal(number // size)[groups]
    noise += math.sqrt(1 - shared**2) * rng.standard_normal(number)
    return labels, noise + norm.ppf(area) * math.sqrt(2) * labels, groups if size > 1 else None


def truth(prevalence, area):
    """The threshold of the most probable class, and the metrics there, of all such images."""
    shift = norm.ppf(area) * math.sqrt(2)
    at = shift / 2 + math.log((1 - prevalence) / prevalence) / shift
    hits, passes = norm.sf(at - shift), norm.cdf(at)
    missed, false = prevalence * (1 - hits), (1 - prevalence) * (1 - passes)
    rights = prevalence * hits, (1 - prevalence) * passes
    f1 = np.mean([2 * right / (2 * right + missed + false) for right in rights])
    accuracy, balanced = sum(rights), (hits + passes) / 2
    shares = {"acc": accuracy, "sensitivity": hits, "specificity": passes}
    return at, shares | {"auc": area, "balanced_acc": balanced, "f1": f1}


@pytest.mark.parametrize("kind", [{}, {"size": 5}, {"size": 5, "of_group": True}])
@pytest.mark.parametrize(("number", "prevalence"), [(200, 0.1), (200, 0.5)])
@pytest.mark.parametrize("area", [0.9, 0.99])
def test_an_interval_covers_the_truth_in_95_percent_of_sets(number, prevalence, area, kind):
    rng = np.random.default_rng([number, int(100 * prevalence), int(100 * area)])
    at, true = truth(prevalence, area)
    covered = dict.fromkeys(true, 0)
    for _ in range(NUM_SETS):
        labels, values, groups = draw(rng, number, prevalence, area, **kind)
        said = np.stack([-values, values], 1)
        for name, (low, high) in intervals(labels, (values > at).astype(int), said, groups).items():
            assert 0 <= low <= high <= 1
            covered[name] += low <= true[name] <= high
    assert min(covered.values()) / NUM_SETS >= LEAST_COVERAGE, covered


def test_groups_count_and_not_their_images():
    rng = np.random.default_rng(0)
    labels, values, _ = draw(rng, 60, 0.5, 0.8)
    said = np.stack([-values, values], 1)
    alone = intervals(labels, (values > 0.5).astype(int), said)
    five = [np.repeat(column, 5, axis=0) for column in (labels, (values > 0.5).astype(int), said)]
    copied, grouped = intervals(*five), intervals(*five, np.repeat(np.arange(60), 5))

    def width(found, name):
        return found[name][1] - found[name][0]

    for name in alone:
        assert width(copied, name) < 0.6 * width(alone, name)  # as if there were more images
        assert width(grouped, name) == pytest.approx(width(alone, name), rel=0.15)


def test_a_share_of_independent_images_has_wilsons_interval():
    hits = np.arange(50) < 47
    ends = binomtest(47, 50).proportion_ci(0.95, "wilson")
    assert share(hits, np.ones(50, bool)) == pytest.approx((ends.low, ends.high))
    assert share(hits, np.zeros(50, bool)) is None


def test_the_variance_of_an_area_is_delongs():
    rng = np.random.default_rng(0)
    labels, values, _ = draw(rng, 300, 0.4, 0.8)
    area, _, influence = auc_interval(labels == 1, values)
    assert area == pytest.approx(scores.auc(labels, np.stack([-values, values], 1)))
    positives, negatives = values[labels == 1], values[labels == 0]
    wins = positives[:, None] > negatives  # DeLong et al. (1988), without ties
    theirs = wins.mean(1).var(ddof=1) / len(positives) + wins.mean(0).var(ddof=1) / len(negatives)
    assert (influence**2).sum() == pytest.approx(theirs)


@pytest.mark.parametrize("area", [0.0, 1.0])
def test_an_area_without_mistakes_has_an_interval_all_the_same(area):
    labels = np.repeat([0, 1], 10)
    found, (low, high), _ = auc_interval(labels == 1, labels * (2 * area - 1))
    assert found == area and 0.1 < high - low < 0.4 and area in (low, high)


def test_more_classes_have_intervals_of_the_mean():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    said = rng.standard_normal((500, 10)) + 2 * np.eye(10)[labels]
    found = intervals(labels, said.argmax(1), said)
    values = scores.from_confusion_matrix(scores.confusion(labels, said.argmax(1), 10))
    values |= {"auc": scores.auc(labels, said)}
    assert found.keys() == {"acc", *values}
    for name, value in values.items():
        assert found[name][0] < value < found[name][1] < found[name][0] + 0.12


def test_what_is_not_defined_has_no_interval():
    labels = np.zeros(5, int)
    found = intervals(labels, labels, np.full((5, 2), 0.5))
    assert found.keys() == {"acc", "balanced_acc", "f1", "specificity"}
    assert "auc" not in intervals(np.arange(2), np.arange(2), np.full((2, 2), np.nan))


def test_the_quantile_is_students():
    for count in (1, 2, 5, 30, 1000):
        theirs = t.ppf(0.975, count + module.PRIOR - 1)
        assert module._quantile(count) == pytest.approx(theirs, rel=1e-2 if count == 1 else 2e-3)
