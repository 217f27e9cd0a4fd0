"""Which learning rate? A range test: ever higher ones, a step each, until the loss bursts.

Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3. It begins from
the weights that a run would begin from, and leaves nothing but a picture.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from cnn.config import Config
from cnn.records import figures
from cnn.training.engine import train_one_epoch
from cnn.training.setup import Run, build_run
from cnn.utils.files import write_atomically

logger = logging.getLogger(__name__)

FIRST_LR, LAST_LR, STEPS = 1e-5, 10.0, 150
SMOOTHING = 0.9  # of the loss, an exponential mean
BURST = 4.0  # times the lowest loss: there is nothing to learn beyond


def range_test(cfg: Config) -> float:
    """Says which learning rate to begin with, and draws logs/find_lr.png.

    Returns:
        The suggestion: a tenth of where the smoothed loss is lowest.
    """
    lrs, losses = sweep(build_run(cfg))
    lowest = min(range(len(losses)), key=losses.__getitem__)
    suggestion = float(f"{lrs[lowest] / 10:.1g}")
    for number in range(0, len(lrs), max(1, len(lrs) // 12)):
        logger.info("lr %8.2g  loss %.4f", lrs[number], losses[number])
    logger.info("the loss is lowest at lr %.2g", lrs[lowest])
    logger.info("try: python train.py optim.lr=%g", suggestion)
    if figures.is_available():
        path = Path("logs", "find_lr.png")
        path.parent.mkdir(exist_ok=True)
        curve = figures.Curve("smoothed loss", lrs, losses)
        title = f"{cfg.model.name} on {cfg.data.name}: try optim.lr={suggestion:g}"
        axes = {"xlabel": "learning rate", "xscale": "log", "mark": "suggestion"}
        picture = figures.curves_png([(title, [curve])], [suggestion], **axes)
        write_atomically(path, lambda file: file.write(picture))
        logger.info("drawn in %s", path)
    else:
        logger.info("left out: the picture (pip install matplotlib)")
    return suggestion


def sweep(run: Run) -> tuple[list[float], list[float]]:
    """Trains with lr rising geometrically; gives each step's lr and smoothed loss."""
    lrs: list[float] = []
    losses: list[float] = []
    mean = loss_before = weight_before = 0
    set_lr(run, 0)
    for _ in endless_steps(run):
        loss, weight = (
            run.state.running_metrics.loss.item(),
            float(run.state.running_metrics.weight),
        )
        latest = (loss - loss_before) / (weight - weight_before)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * latest
        smoothed = mean / (1 - SMOOTHING ** (len(lrs) + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > BURST * min(losses)):
            break
        lrs.append(run.state.lr)
        losses.append(smoothed)
        if len(lrs) == STEPS:
            break
        loss_before, weight_before = loss, weight
        set_lr(run, len(lrs))
    return lrs, losses


def endless_steps(run: Run) -> Iterator[int]:
    """The steps of one epoch after the other."""
    while True:
        yield from train_one_epoch(run, run.train_loader.train_batches(run.state.epoch + 1))
        run.state.batch, run.state.epoch = 0, run.state.epoch + 1


def set_lr(run: Run, step: int) -> None:
    """Sets the highest group's learning rate for a step; the others keep their ratio to it."""
    groups = run.state.optimizer.param_groups
    highest = max(group["initial_lr"] for group in groups)
    lr = FIRST_LR * (LAST_LR / FIRST_LR) ** (step / (STEPS - 1))
    for group in groups:
        group["lr"] = lr * group["initial_lr"] / highest
