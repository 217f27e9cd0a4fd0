"""An epoch of training and a pass of evaluation: mathematics, nothing else."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from cnn.datasets.loader import Batch
from cnn.metrics.running import RunningMetrics, compute_loss, weight_of
from cnn.metrics.scores import Metrics
from cnn.training.distributed import ALONE, Group
from cnn.training.optim import freeze
from cnn.training.run import Run
from cnn.training.state import TrainingState
from cnn.utils import seeding
from cnn.utils.module_state import state_preserved


def train_one_epoch(run: Run, batches: Iterable[Batch]) -> Iterator[int]:
    """Trains the model on the rest of an epoch.

    Between two optimizer steps `run.state` is complete and may be saved.

    Args:
        batches: from number `run.state.batch` of the epoch on.

    Yields:
        The number of batches in each optimizer step, after the step.
    """
    cfg, state, group = run.cfg.train, run.state, run.group
    freeze(state.optimizer, state.epoch)
    set_training_mode(state.model)
    for step in in_chunks(batches, cfg.accumulate):
        weights = [weight_of(run.loss, labels[:count]) for _, labels, count in step]
        total_weight = group.sum(sum(weights), state.device)
        group.broadcast_module(state.loss)
        metrics = RunningMetrics(state.device)
        for number, (images, labels, count) in enumerate(step):
            seed_batch(run, number)
            with group.no_sync(run.train_model, number + 1 < len(step)), run.autocast():
                logits = run.train_model(images)
            loss = compute_loss(run.loss, logits, labels)
            metrics.add(loss, logits[:count], labels[:count], weights[number])
            # Times group.size, the average of gradients over the processes becomes their sum.
            state.scaler.scale(loss * (weights[number] / total_weight * group.size)).backward()
        if cfg.clip_grad_norm is not None:
            clip_gradients(state, cfg.clip_grad_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        state.end_step(len(step), group.sum_metrics(metrics))
        yield len(step)
        del step, images, labels  # frees their memory before the next batches are loaded


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
    """Computes metrics of a model over batches, and leaves model and loss function as they were.

    Their state dicts are restored even where an exception ends the batches.

    Args:
        metrics: accumulates the batches; an `EvaluationMetrics` where there are several processes.
        seed, epoch: key the draws of a model that is random in evaluation, such as Monte-Carlo
            dropout, together with the number of the batch.
        group: the processes, each of which evaluates every `group.size`-th batch; all of them get
            the same metrics.

    Returns:
        The values of `metrics` by name.
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
    """Returns an iterator over lists of `size` batches, the last of which may be shorter.

    All batches of an optimizer step are thus there before the first is used: where one of them
    cannot be loaded, no step is half done. It also keeps augmentations, which draw from the global
    generators when there are no worker processes, apart from the draws of the model.
    """
    batches = iter(batches)
    return iter(lambda: list(itertools.islice(batches, size)), [])


def seed_batch(run: Run, number: int) -> None:
    """Seeds the generators that dropout and the like draw from, for a batch of this step."""
    key = (seeding.STEP, run.state.step, number, *run.group.key)
    seeding.seed_step(run.state.device, run.cfg.seed, *key)


def clip_gradients(state: TrainingState, max_norm: float) -> None:
    """Scales the gradient of all parameters down to a norm of at most `max_norm`."""
    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, max_norm)


def set_training_mode(model: nn.Module) -> None:
    """Sets training mode, except in norms whose parameters are frozen: their statistics stay."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and parameters:
            module.train(any(parameter.requires_grad for parameter in parameters))
