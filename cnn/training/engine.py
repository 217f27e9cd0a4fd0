"""An epoch of training and a pass of evaluation: mathematics, nothing else."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from cnn.datasets.loader import Batch
from cnn.metrics.running import RunningMetrics, compute_loss, weight_of
from cnn.metrics.scores import Metrics
from cnn.training.distributed import ALONE, Group
from cnn.training.mixing import mix_batch, mixed_loss, weight_of_targets
from cnn.training.optim import freeze
from cnn.training.run import Run
from cnn.utils import seeding
from cnn.utils.module_state import state_preserved


def train_one_epoch(run: Run, batches: Iterable[Batch]) -> Iterator[int]:
    """Trains the model on the remaining batches of the current epoch.

    The function is a generator. One optimizer step is taken before each `yield`. At each `yield`,
    `run.state` is complete and may be saved.

    Args:
        run: the run, whose state is changed in place.
        batches: the share of this process in each remaining batch. The number of batches already
            done is `run.state.batch`.

    Yields:
        The number of batches in the latest optimizer step.
    """
    cfg, state, group = run.cfg.train, run.state, run.group
    freeze(state.optimizer, state.epoch)
    set_training_mode(state.model)
    for step in in_chunks(batches, cfg.accumulate):
        for number, batch in enumerate(step):
            words = (run.cfg.seed, seeding.MIX, state.step, number)
            step[number] = mix_batch(cfg, batch, group, *words)
        weights = [weight_of_targets(run.loss, targets, count) for _, targets, count in step]
        total_weight = group.sum(sum(weights), state.device)
        group.broadcast_module(state.loss)
        metrics = RunningMetrics(state.device)
        for number, (images, targets, count) in enumerate(step):
            # Keyed by the step and not by what was drawn before, so that a resumed run draws alike.
            key = (seeding.STEP, state.step, number, *group.key)
            seeding.seed_step(state.device, run.cfg.seed, *key)
            with group.no_sync(run.train_model, number + 1 < len(step)), run.autocast():
                logits = run.train_model(images)
            loss = mixed_loss(run.loss, logits, targets)
            metrics.add(loss, logits[:count], targets[0][1][:count], weights[number])
            # Multiplied by group.size, the average of gradients over the processes is their sum.
            state.scaler.scale(loss * (weights[number] / total_weight * group.size)).backward()
        if cfg.clip_grad_norm is not None:
            state.scaler.unscale_(state.optimizer)  # the gradients of fp16 are scaled up
            nn.utils.clip_grad_norm_(state.parameters(), cfg.clip_grad_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.end_step(len(step), group.sum_metrics(metrics))
        yield len(step)
        del step, batch, images, targets  # frees their memory before the next batches are loaded


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_function: nn.Module,
    autocast: Callable[[], torch.autocast],
    metrics: RunningMetrics,
    *,
    seed: int,
    epoch: int,
    group: Group = ALONE,
) -> Metrics:
    """Evaluates a model on batches, and returns the metrics.

    The state dicts of the model and the loss function do not change.

    Args:
        model: the model, which is put into evaluation mode for the duration of the call.
        batches: the batches that this process evaluates. With n processes, the process with rank r
            evaluates the batches r, r + n, r + 2n and so on.
        loss_function: computes the mean loss () from logits (N, classes) and labels (N).
        autocast: a function that returns the context of a forward pass.
        metrics: the metrics to compute, still without batches. Several processes need an
            `EvaluationMetrics`.
        seed, epoch: the seed of the run, and the number of the epoch. Both determine the random
            numbers that the model draws.
        group: the processes that evaluate together. Every process gets the same metrics.

    Returns:
        The values of the metrics by name, such as {"loss": 0.1, "acc": 0.98}.
    """
    was_training = model.training
    model.eval()
    group.broadcast_module(model)
    group.broadcast_module(loss_function)
    device = next(model.parameters()).device
    with state_preserved(model, loss_function):
        for turn, (images, labels, _) in enumerate(batches):
            number = turn * group.size + group.rank
            seeding.seed_step(device, seed, seeding.EVALUATE, epoch, number)
            with autocast():
                logits = model(images)
            loss = compute_loss(loss_function, logits, labels)
            metrics.add(loss, logits, labels, weight_of(loss_function, labels))
    model.train(was_training)
    if group.size > 1:
        metrics.gather(group.all_gather)
    return metrics.compute()


def in_chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Returns an iterator over lists of consecutive batches.

    Each list contains the batches of one optimizer step. All batches of a list are loaded before
    the list is returned.

    Args:
        batches: the batches.
        size: the length of each list. The last list can be shorter.
    """
    # Without worker processes, the augmentations draw from the same global generators as the model;
    # loading first keeps their draws apart.
    batches = iter(batches)
    return iter(lambda: list(itertools.islice(batches, size)), [])


def set_training_mode(model: nn.Module) -> None:
    """Puts a model into training mode, except for frozen BatchNorm layers.

    A BatchNorm layer is frozen if none of its parameters requires a gradient. Frozen layers are put
    into evaluation mode, so that their running statistics do not change.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and parameters:
            module.train(any(parameter.requires_grad for parameter in parameters))
