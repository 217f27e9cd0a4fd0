"""Whether two models differ on the same images: p-values, intervals, and what compare.py says."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, norm

import compare
from cnn.metrics.comparison import compare_areas, compare_hits, holm
from cnn.records.run_record import read_run
from compare import paired_rows


def test_the_p_value_of_accuracies_is_mcnemars():
    first = np.repeat([1, 1, 0, 0], [50, 4, 12, 9]).astype(bool)
    second = np.repeat([1, 0, 1, 0], [50, 4, 12, 9]).astype(bool)
    value, (low, high), p_value = compare_hits(first, second)
    assert value == pytest.approx(8 / 75) and low < value < high
    assert p_value == pytest.approx(binomtest(4, 16).pvalue)
    assert compare_hits(first, first) == (0, (0, 0), 1)
    backwards = compare_hits(second, first)
    assert backwards[0] == -value and backwards[2] == p_value


def test_the_p_value_of_areas_is_delongs():
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    one, other = (labels + 1.2 * rng.standard_normal(200) for _ in range(2))
    value, (low, high), p_value = compare_areas(labels, one, other)
    placements = []
    for scores in (one, other):
        wins = scores[labels][:, None] > scores[~labels]
        placements.append((wins.mean(1), wins.mean(0), wins.mean()))
    theirs = placements[1][2] - placements[0][2]
    spread = sum(
        np.var(placements[1][side] - placements[0][side], ddof=1) / number
        for side, number in ((0, labels.sum()), (1, (~labels).sum()))
    )
    assert value == pytest.approx(theirs)
    assert p_value == pytest.approx(2 * norm.sf(abs(theirs) / np.sqrt(spread)))
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(spread), rel=1e-3)
    assert compare_areas(np.ones(50, bool), one[:50], other[:50]) is None
    few = np.arange(200) < 9  # the normal approximation does not hold
    assert compare_areas(few, one, other) is None
    assert compare_areas(np.arange(200) < 50, one, other, np.arange(200) // 6) is None


@pytest.mark.parametrize("size", [1, 5])
def test_equal_models_differ_in_5_percent_of_sets(size):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        groups = np.repeat(np.arange(60), size)
        shared = rng.standard_normal((2, 60))[:, groups]
        labels = (rng.random(60) < 0.5)[groups]
        scores = labels + shared + 0.3 * rng.standard_normal((2, len(groups)))
        hits = (scores > 0.5) == labels
        every = groups if size > 1 else None
        found.append((compare_hits(*hits, every)[2], compare_areas(labels, *scores, every)[2]))
    wrong = (np.array(found) < 0.05).mean(0)
    assert (wrong < 0.09).all() and wrong[1] > 0.02, wrong


def test_many_images_take_no_time():
    each = np.arange(60_000) % 2 == 0
    assert compare_hits(each, ~each)[2] == 1


def test_holm_corrects_for_the_number_of_comparisons():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_compare_says_whether_runs_differ_on_the_same_test(train, capsys):
    words = ("data.args={num_images: 70, num_test: 40, num_classes: 2, image_size: 8, noise: 60}",)
    assert train(*words, "run=bad", "optim.lr=0.0001") == 0
    assert train(*words, "run=good", "train.epochs=5") == 0
    assert train("run=other") == 0
    capsys.readouterr()
    assert compare.main(["bad", "good", "--output", "page.html"]) == 0
    said = capsys.readouterr().out
    part = said.partition("Differences on the same test images")[2].split("\n\n")[1].splitlines()
    assert [line.split()[:2] for line in part] == [
        *(["against", "bad"], ["good", "acc"], ["good", "auc"])
    ]
    assert float(part[1].split()[-2]) < 0.05 and float(part[1].split()[2]) > 0.1
    with_other = paired_rows([read_run(name) for name in ("bad", "other", "good")])
    assert [row[:2] for row in with_other[1:]] == [["good", "acc"], ["good", "auc"], ["other", ""]]
    assert with_other[-1][2] == "other test images"
    assert "Differences on the same test images" in Path("page.html").read_text()
    assert train(*words, "data.args={num_test: 40, num_classes: 2, image_size: 8}", "run=new") == 0
    assert [row[2] for row in paired_rows([read_run(n) for n in ("bad", "new")])[1:]] == [
        "other test images"
    ]
    for name in ("good", "bad"):
        Path(f"logs/{name}/predictions_test.csv").unlink()
        assert compare.main(["bad", "good"]) == 0
        assert "Differences on" not in capsys.readouterr().out
