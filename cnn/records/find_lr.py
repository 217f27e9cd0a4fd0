"""Learning-rate range test: trains with ever higher learning rates until the loss explodes.

Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017, section 3.3. Each rate is
used for one step. The test starts from the weights from which a run would start, and writes nothing
except a picture.
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
from cnn.utils.outputs import write_output

logger = logging.getLogger(__name__)

FIRST_LR, LAST_LR, STEPS = 1e-5, 10.0, 150
SMOOTHING = 0.9  # the decay of the exponential mean of the loss
EXPLOSION = 4.0  # the test ends when the loss is this many times its lowest value
PICTURE = Path("logs", "find_lr.png")


def range_test(cfg: Config) -> None:
    """Trains with a rising learning rate, and logs a learning rate to try.

    The learning rate to try is a tenth of the learning rate with the lowest smoothed loss. If
    matplotlib is installed, the loss curve is drawn in logs/find_lr.png.

    Args:
        cfg: the settings of the model, the data and the training.
    """
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
    write_output(PICTURE, figures.png(figures.draw_panels, [panel], width=6.4, height=4.0))
    logger.info("drawn in %s", PICTURE)


def train_with_rising_lr(run: Run) -> tuple[list[float], list[float]]:
    """Trains with a learning rate that rises geometrically from 1e-5 to 10.

    The ratios between the learning rates of the parameter groups stay as at the start of the run.

    The training takes 150 steps. The training ends earlier if the smoothed loss is not finite. The
    training also ends if the smoothed loss exceeds 4 times the lowest value so far.

    Args:
        run: the run to train. The state of the run is changed in place.

    Returns:
        Two lists with an entry per step: the values of `optim.lr` and the smoothed losses. A step
        that ends the training early has no entry. A smoothed loss is the exponential mean of the
        losses so far. The bias of the mean is corrected as in Adam (Kingma and Ba, ICLR 2015).
    """
    lrs, losses, state, steps = [], [], run.state, endless_steps(run)
    mean, groups = 0.0, state.optimizer.param_groups
    for number, lr in enumerate(np.geomspace(FIRST_LR, LAST_LR, STEPS).tolist()):
        for group in groups:
            group["lr"] = lr * group["initial_lr"] / run.cfg.optim.lr
        next(steps)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * state.running_metrics.compute()["loss"]
        state.running_metrics = RunningMetrics(state.device)  # for the next step
        smoothed = mean / (1 - SMOOTHING ** (number + 1))
        if not math.isfinite(smoothed) or smoothed > EXPLOSION * min(losses, default=math.inf):
            break
        lrs.append(lr)
        losses.append(smoothed)
    return lrs, losses


def endless_steps(run: Run) -> Iterator[int]:
    """Trains epoch after epoch without an end, and pauses after each optimizer step.

    Args:
        run: the run to train. The state of the run is changed in place.

    Yields:
        The number of batches in the latest optimizer step.
    """
    state = run.state
    while True:
        yield from train_one_epoch(run, run.train_loader.train_batches(state.epoch + 1))
        state.batch, state.epoch = 0, state.epoch + 1
