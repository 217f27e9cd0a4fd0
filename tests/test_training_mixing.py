"""Mixup and CutMix: what is mixed, with which labels, and that processes agree."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, history
from torch import nn

from cnn.config import load_config
from cnn.config.settings import TrainConfig
from cnn.training.distributed import ALONE
from cnn.training.mixing import mix_batch, mixed_loss, weight_of_targets

WORDS = (0, 8, 3, 0)


def batch(number: int = 12, size: int = 10):
    """Images that are all of the value of their index, with labels that are the index."""
    labels = torch.arange(number)
    images = labels.float()[:, None, None, None].expand(number, 3, size, size).clone()
    return images.contiguous(memory_format=torch.channels_last), labels, number


def test_without_a_strength_nothing_is_touched():
    images, labels, count = batch()
    mixed, targets, number = mix_batch(TrainConfig(), (images, labels, count), ALONE, *WORDS)
    assert mixed is images and targets[0][1] is labels and len(targets) == 1 and number == count


@pytest.mark.parametrize("step", range(20))
def test_mixup_is_the_mean_of_two_images_weighted_as_their_labels(step):
    images, labels, count = batch()
    words = (0, 8, step, 0)
    mixed, targets, _ = mix_batch(TrainConfig(mixup=1.0), (images, labels, count), ALONE, *words)
    (share, first), (rest, second) = targets
    assert first.equal(labels) and 0.5 <= share <= 1 and share + rest == pytest.approx(1)
    assert sorted(second.tolist()) == labels.tolist(), "each image is once the other one"
    expected = share * first + rest * second
    torch.testing.assert_close(mixed, expected[:, None, None, None].expand_as(mixed).float())
    assert images.equal(batch()[0]), "the given images stay"


@pytest.mark.parametrize("step", range(20))
def test_cutmix_is_a_box_of_the_other_image_with_the_share_of_its_pixels(step):
    images, labels, count = batch(size=16)
    words = (0, 8, step, 0)
    mixed, targets, _ = mix_batch(TrainConfig(cutmix=1.0), (images, labels, count), ALONE, *words)
    (share, first), (_, second) = targets
    is_own = mixed[:, 0] == first[:, None, None]
    is_other = mixed[:, 0] == second[:, None, None]
    assert (is_own | is_other).all()
    moved = (first != second).nonzero()[:, 0]
    assert 0.5 <= share <= 1
    for index in moved.tolist():
        assert is_own[index].float().mean().item() == pytest.approx(share)
        rows, columns = (mixed[index, 0] != labels[index]).nonzero(as_tuple=True)
        if len(rows):
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert box == len(rows), "one box"


def test_boxes_are_as_large_as_in_the_paper():
    cfg, images = TrainConfig(cutmix=1.0), batch(4, 32)
    drawn = [mix_batch(cfg, images, ALONE, 0, 8, step, 0)[1] for step in range(2000)]
    assert np.mean([rest for _, (rest, _) in drawn]) == pytest.approx(0.278, abs=0.01)
    others = [not first.equal(images[1]) for (_, first), _ in drawn]
    assert 0.1 < np.mean(others) < 0.3, "a box can be most of the image"


def test_both_are_taken_by_chance_and_the_step_decides():
    cfg, kinds = TrainConfig(mixup=0.4, cutmix=1.0), set()
    for step in range(30):
        mixed = mix_batch(cfg, batch(), ALONE, 0, 8, step, 0)[0]
        assert mixed.equal(mix_batch(cfg, batch(), ALONE, 0, 8, step, 0)[0])
        kinds.add(bool((mixed == mixed.round()).all()))
    assert kinds == {True, False}
    first = mix_batch(cfg, batch(), ALONE, 0, 8, 1, 0)[1][0][0]
    assert first != mix_batch(cfg, batch(), ALONE, 1, 8, 1, 0)[1][0][0]


@pytest.mark.parametrize("cfg", [TrainConfig(mixup=1.0), TrainConfig(cutmix=1.0)])
@pytest.mark.parametrize("cuts", [(5, 12), (4, 8, 12), (12, 12)])
def test_processes_mix_as_one_process_does(cfg, cuts):
    images, labels, _ = batch()
    expected, targets, _ = mix_batch(cfg, batch(), ALONE, *WORDS)
    starts = (0, *cuts[:-1])
    shares = [
        (images[a:b], labels[a:b], b - a) if b > a else (images[:2], labels[:2], 0)
        for a, b in zip(starts, cuts)
    ]
    sent = [(part[:n], own[:n]) for part, own, n in shares]
    for rank, (part, (start, end)) in enumerate(zip(shares, zip(starts, cuts))):
        group = SimpleNamespace(rank=rank, all_gather=lambda _: pickle.loads(pickle.dumps(sent)))
        mixed, own_targets, count = mix_batch(cfg, part, group, *WORDS)
        assert count == end - start
        if not count:
            assert mixed.equal(images[:2]) and len(own_targets) == 1
            continue
        assert mixed.equal(expected[start:end])
        for (share, own), (whole, every) in zip(own_targets, targets):
            assert share == whole and own.equal(every[start:end])


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_the_loss_is_that_of_soft_labels(weights):
    torch.manual_seed(0)
    logits, first, second = torch.randn(6, 3), torch.randint(3, (6,)), torch.randint(3, (6,))
    loss, targets = nn.CrossEntropyLoss(weights), [(0.7, first), (0.3, second)]
    soft = 0.7 * nn.functional.one_hot(first, 3) + 0.3 * nn.functional.one_hot(second, 3)
    scale = torch.ones(3) if weights is None else weights
    each = -(soft * scale * logits.log_softmax(1)).sum(1)
    expected = each.sum() / (soft * scale).sum()
    torch.testing.assert_close(mixed_loss(loss, logits, targets).float(), expected)
    assert float(weight_of_targets(loss, targets, 6)) == pytest.approx(float((soft * scale).sum()))
    assert weight_of_targets(loss, [(1, first)], 6) == (
        6 if weights is None else scale[first].sum()
    )


def test_a_run_says_what_train_acc_counts(train, capfd):
    assert train(*TINY, "train.mixup=0.2", "train.cutmix=1") == 0
    assert "train_acc counts the label with the larger share" in capfd.readouterr().err
    assert np.isfinite([float(row["train_loss"]) for row in history(".")]).all()
    assert load_config(None, ["train.mixup=0.2"])[0].train.cutmix == 0
