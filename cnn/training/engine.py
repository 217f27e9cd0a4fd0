"""An epoch of training and a pass of evaluation: mathematics, nothing else."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from cnn.metrics.running import RunningMetrics, loss_of, weight_of
from cnn.metrics.scores import Metrics
from cnn.training.distributed import ALONE, Group
from cnn.training.optim import freeze
from cnn.training.state import TrainingState
from cnn.utils import seeding
from cnn.utils.module_state import state_preserved

Batch = tuple[torch.Tensor, torch.Tensor]  # images float (N, C, H, W), labels int64 (N)


def train_one_epoch(
    state: TrainingState,
    batches: Iterable[Batch],
    sizes: list[int],
    loss_function: nn.Module,
    autocast: Callable[[], torch.autocast],
    *,
    seed: int,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
) -> Iterator[int]:
    """Trains from where `state` stands to the epoch's end.

    Args:
        batches: those still to come, from `state.batch` on.
        sizes: images in each of the epoch's batches, the ones done included; of several processes,
            each has its own. The first so many of a batch count: a process for which there are none
            computes others', so that all take the same steps.

    Yields:
        The number of batches of each optimizer step, after it. Between two steps `state` is whole,
        and may be saved; nothing of a step is kept elsewhere.
    """
    optimizer, scaler = state.optimizer, state.scaler
    parameters = [p for part in optimizer.param_groups for p in part["params"]]
    freeze(optimizer, state.epoch)
    set_training(state.model)
    batches = iter(batches)
    while state.batch < len(sizes):
        in_step = sizes[state.batch : state.batch + accumulate]
        # All of them before the first is used: where one cannot be had, nothing is half done.
        # And before the seed: without workers, augmentations draw from the same generators.
        step = [next(batches) for _ in in_step]
        _add_gradients(state, step, in_step, loss_function, autocast, seed)
        del step  # before another batch is made
        if clip_grad_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.end_step(len(in_step))
        yield len(in_step)


def _add_gradients(
    state: TrainingState,
    step: list[Batch],
    sizes: list[int],
    loss_function: nn.Module,
    autocast: Callable[[], torch.autocast],
    seed: int,
) -> None:
    """Forward and backward passes over the batches of a step; their sums go into the state's."""
    group = state.group
    weights = [weight_of(loss_function, labels[:own]) for (_, labels), own in zip(step, sizes)]
    total = group.sum(sum(weights), state.device)
    group.broadcast_module(state.loss)
    sums = RunningMetrics(state.device)
    for number, ((images, labels), own, weight) in enumerate(zip(step, sizes, weights)):
        more = number + 1 < len(step)
        seeding.seed_step(state.device, *(seed, seeding.STEP, state.step, number), *group.key)
        with group.accumulating(state.forward, more), autocast():
            logits = state.forward(images)
        loss = loss_of(loss_function, logits, labels)
        sums.add(loss, logits[:own], labels[:own], weight)
        finish_sums = None if more else group.add_up(sums)
        # Gradients are averaged over the processes: times their number, it is the sum.
        state.scaler.scale(loss * (weight / total() * group.size)).backward()
    finish_sums()
    state.running_metrics.merge(sums)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_function: nn.Module,
    autocast: Callable[[], torch.autocast],
    prefix: str,
    sums: RunningMetrics | None = None,
    *,
    seed: int,
    epoch: int,
    group: Group = ALONE,
) -> Metrics:
    """Loss and accuracy of the model over all the batches, named PREFIXloss and PREFIXacc.

    Model and loss are left as they were, also where the batches end with an exception: what is saved
    then is where the evaluation began.

    Args:
        sums: where to add the batches, for more than these two: an `EvaluationMetrics`.
        seed, epoch: what a model that draws, such as Monte-Carlo dropout, is keyed by, with the
            number of the batch.
        group: whose processes each evaluate batches in turn; all are given the metrics. Of several,
            `sums` is an `EvaluationMetrics`.
    """
    was_training = model.training
    model.eval()
    group.broadcast_module(model)
    group.broadcast_module(loss_function)
    device = next(model.parameters()).device
    sums = RunningMetrics(device) if sums is None else sums
    with state_preserved(model, loss_function):
        for turn, (images, labels) in enumerate(batches):
            number = turn * group.size + group.rank
            seeding.seed_step(device, seed, seeding.EVALUATE, epoch, number)
            with autocast():
                logits = model(images)
            loss = loss_of(loss_function, logits, labels)
            sums.add(loss, logits, labels, weight_of(loss_function, labels))
    model.train(was_training)
    group.gather(sums)
    return {prefix + name: value for name, value in sums.compute().items()}


def set_training(model: nn.Module) -> None:
    """Training mode, but for norms whose parameters are all frozen: these keep their statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own:
            module.train(any(parameter.requires_grad for parameter in own))
