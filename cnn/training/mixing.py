"""Mixup and CutMix: training on mixtures of two images, with the labels of both."""

import numpy as np
import torch
from torch import Tensor, nn

from cnn.config.settings import TrainConfig
from cnn.datasets.loader import Batch
from cnn.metrics.running import Weight, compute_loss, weight_of
from cnn.training.distributed import Group
from cnn.utils import seeding

# Labels (N), and their share in the images. The labels with the largest share come first.
Targets = list[tuple[float, Tensor]]
MixedBatch = tuple[Tensor, Targets, int]  # as `Batch`, with the labels of both images


def mix_batch(cfg: TrainConfig, batch: Batch, group: Group, *words: int) -> MixedBatch:
    """Mixes each image of a batch with another image of the batch.

    In mixup (Zhang et al., 2018), the pixels are weighted means. In CutMix (Yun et al., 2019), a
    box of the image is replaced by that of the other. If the settings ask for both, a batch gets
    one of them by chance. The share of an image is drawn from Beta(s, s), where s is the strength,
    once per batch. In mixup, the larger part is always that of the image itself, which changes
    nothing, as every image is also the other one of a pair.

    The draws and the pairs depend on the batch of all processes together, and not on the number of
    processes, which exchange their images.

    Args:
        cfg: the settings, with the strengths.
        batch: the share of this process in a batch.
        group: the processes that train together.
        words: integers that seed the draws, such as the seed of the run and the step.
    """
    images, labels, count = batch
    methods = [(mix, s) for mix, s in ((_mixup, cfg.mixup), (_cutmix, cfg.cutmix)) if s]
    if not methods:
        return images, [(1, labels)], count
    rng = np.random.Generator(np.random.Philox(key=seeding.mix(*words)))
    mix, strength = methods[rng.integers(len(methods))]
    share = float(rng.beta(strength, strength))
    parts = group.all_gather((images[:count], labels[:count]))
    others, other_labels = (torch.cat([each.to(images.device) for each in p]) for p in zip(*parts))
    first = sum(len(part) for _, part in parts[: group.rank])
    pairs = torch.from_numpy(rng.permutation(len(others)))[first : first + count]
    if not count:  # this process has no share, and its images do not count
        return images, [(1, labels)], count
    pairs = pairs.to(images.device)
    mixed, share = mix(images, others[pairs], share, rng)
    targets = [(share, labels), (1 - share, other_labels[pairs])]
    return mixed, sorted(targets, key=lambda target: -target[0]), count


def _mixup(images: Tensor, others: Tensor, share: float, _: object) -> tuple[Tensor, float]:
    share = max(share, 1 - share)
    return images.lerp(others, 1 - share), share


def _cutmix(
    images: Tensor, others: Tensor, share: float, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Replaces a random box, whose center is anywhere, and returns the share that is left."""
    box, area = [], 1
    for size in images.shape[2:]:
        center, half = rng.random() * size, size * (1 - share) ** 0.5 / 2
        start, end = max(0, round(center - half)), min(size, round(center + half))
        box.append(slice(start, end))
        area *= end - start
    mixed = images.clone()
    mixed[(..., *box)] = others[(..., *box)]
    return mixed, 1 - area / images[0, 0].numel()


def weight_of_targets(loss: nn.Module, targets: Targets, count: int) -> Weight:
    """Returns the weight of a batch in the mean loss, as `weight_of` does for plain labels."""
    return sum(share * weight_of(loss, labels[:count]) for share, labels in targets)


def mixed_loss(loss: nn.Module, logits: Tensor, targets: Targets) -> Tensor:
    """Returns the mean loss () of a batch.

    Args:
        loss: computes the mean loss () from logits (N, classes) and labels (N).
        logits: the outputs of the model, (N, classes).
        targets: the labels of the images, with their shares.
    """
    if len(targets) == 1:
        return compute_loss(loss, logits, targets[0][1])
    weights = [share * weight_of(loss, labels) for share, labels in targets]
    losses = [compute_loss(loss, logits, labels) for _, labels in targets]
    return sum(w * each for w, each in zip(weights, losses)) / sum(weights)
