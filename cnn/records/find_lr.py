"""Learning-rate range test: ever higher rates, one step each, until the loss explodes.

Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3. It starts from
the weights that a run would start from, and writes nothing but a picture.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cnn.config import Config
from cnn.metrics.running import RunningMetrics
from cnn.records import figures
from cnn.training.engine import train_one_epoch
from cnn.training.run import Run
from cnn.training.setup import build_run

logger = logging.getLogger(__name__)

FIRST_LR, LAST_LR, STEPS = 1e-5, 10.0, 150
SMOOTHING = 0.9  # of the loss, an exponential mean
EXPLOSION = 4.0  # times the lowest loss: the test ends there
PICTURE = Path("logs", "find_lr.png")


def range_test(cfg: Config) -> None:
    """Suggests a learning rate, a tenth of where the loss is lowest, and draws the curve."""
    lrs, losses = train_with_rising_lr(build_run(cfg))
    lowest = lrs[np.argmin(losses)]
    suggestion = float(f"{lowest / 10:.1g}")
    for number in range(0, len(lrs), max(1, len(lrs) // 12)):
        logger.info("lr %8.2g  loss %.4f", lrs[number], losses[number])
    logger.info("the loss is lowest at lr %.2g", lowest)
    logger.info("try: python train.py optim.lr=%g", suggestion)
    if not figures.is_available():
        logger.info("left out: %s (pip install matplotlib)", PICTURE)
        return
    panel = figures.Panel(
        f"{cfg.model.name} on {cfg.data.name}: try optim.lr={suggestion:g}",
        [figures.Curve("smoothed loss", lrs, losses)],
        marks=[suggestion],
        mark_label="suggestion",
        xlabel="learning rate",
        xscale="log",
    )
    PICTURE.parent.mkdir(exist_ok=True)
    figures.save_png(PICTURE, figures.draw_panels, [panel], width=6.4, height=4.0)
    logger.info("drawn in %s", PICTURE)


def train_with_rising_lr(run: Run) -> tuple[list[float], list[float]]:
    """Trains with a geometrically rising learning rate, until the end or an exploding loss.

    Returns:
        The learning rate of each step, and the exponential mean of the losses up to it, corrected
        for its bias to 0 as in Adam (Kingma and Ba, ICLR 2015).
    """
    lrs, losses, state = [], [], run.state
    mean = 0.0
    set_lr(run, 0)
    for _ in endless_steps(run):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * state.running_metrics.compute()["loss"]
        state.running_metrics = RunningMetrics(state.device)  # of the next step
        smoothed = mean / (1 - SMOOTHING ** (len(lrs) + 1))
        if not math.isfinite(smoothed) or smoothed > EXPLOSION * min(losses, default=math.inf):
            break
        lrs.append(state.lr)
        losses.append(smoothed)
        if len(lrs) == STEPS:
            break
        set_lr(run, len(lrs))
    return lrs, losses


def endless_steps(run: Run) -> Iterator[int]:
    """Yields after each optimizer step, epoch after epoch."""
    state = run.state
    while True:
        yield from train_one_epoch(run, run.train_loader.train_batches(state.epoch + 1))
        state.batch, state.epoch = 0, state.epoch + 1


def set_lr(run: Run, step: int) -> None:
    """Sets the highest learning rate for a step; those of other groups keep their ratio to it."""
    groups = run.state.optimizer.param_groups
    highest = max(group["initial_lr"] for group in groups)
    lr = FIRST_LR * (LAST_LR / FIRST_LR) ** (step / (STEPS - 1))
    for group in groups:
        group["lr"] = lr * group["initial_lr"] / highest
