"""What a run says of itself: the lines at the start, the line of an epoch, model.txt."""

import logging
import math
import shlex
import sys

import numpy as np

from cnn.config import Config, to_yaml
from cnn.config.settings import LOSSES
from cnn.datasets.augment import DRAWS
from cnn.metrics.scores import with_interval
from cnn.models.flops import count_flops
from cnn.training.optim import FREEZE
from cnn.training.resume import Checkpoint
from cnn.training.setup import Run
from cnn.training.state import TrainingState
from cnn.utils.environment import environment_changes
from cnn.utils.files import write_record
from cnn.utils.progress import format_duration
from cnn.utils.run_folder import RunLogs
from cnn.utils.screen import escape_unprintable

logger = logging.getLogger(__name__)

MAX_LISTED = 140  # characters of a line that counts the classes
ABSURD = 1000  # times the loss of guessing; what has learnt nothing, or by heart, stays below 100
QUIET = {"val_balanced_acc", "val_f1", "val_top5_acc"}  # in history.csv, not in an epoch's line


def write(logs: RunLogs, run: Run, point: Checkpoint | None) -> None:
    """Says what the run is, in the log, in config.yaml and in model.txt."""
    if point is not None:
        _log_resume(run, point)
    pre = run.data.preprocessing
    flops = count_flops(run.state.model, (pre.channels, pre.image_size, pre.image_size))
    log_start(run, flops)
    write_record(logs.config, to_yaml(run.cfg))
    write_record(logs.model, model_text(run, flops))


def _log_resume(run: Run, point: Checkpoint) -> None:
    state = run.state
    at = f"epoch {state.epoch + 1}, step {state.step}, batch {state.batch}"
    logger.info("==== resumed from %s: %s of %d ====", point.path, at, len(run.train_loader))
    if point.changes:
        logger.info("settings changed: %s", "; ".join(point.changes))
    draws = point.content.get("draws", 1)  # not in files of before
    if draws != DRAWS and point.cfg.data.augment:
        logger.warning(
            f"random changes to images are drawn in a new way since this file was written (draws"
            f" {draws} → {DRAWS}); the rest of the run draws in the new way"
        )
    different = environment_changes(point.content["environment"], run.environment)
    if different:
        logger.warning(
            "not as before: %s; the run goes on, equal up to rounding", ", ".join(different)
        )
    if state.group.size != point.content["environment"].get("world_size", 1):
        logger.warning(
            "the images that follow are the same; dropout and BatchNorm, if the model has them, go by"
            " each process's share"
        )


def log_start(run: Run, flops: int | None) -> None:
    """At most eight lines: versions and device, data, model, optimizer."""
    cfg, data, state, env = run.cfg, run.data, run.state, run.environment
    device = env["device"]
    if state.device.type == "cpu":
        device += f" ({env['threads']} threads)"
    logger.info("torch %s on %s, %s; seed %d", env["torch"], device, env["precision"], cfg.seed)
    pre = data.preprocessing
    shape = f"{pre.channels}x{pre.image_size}x{pre.image_size}"
    logger.info("data %s: images %s, %d classes", cfg.data.name, shape, len(data.classes))
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        logger.info("  %-5s %6d  %s", part, len(images), _counts(images.labels, data.classes))
    size = f"{sum(p.numel() for p in state.model.parameters()):,} parameters"
    logger.info("model %s: %s, %s a forward image", cfg.model.name, size, _flops_text(flops))
    for group in state.optimizer.param_groups:
        if state.epoch < group.get(FREEZE, 0):
            logger.info("frozen for the first %d epochs: %s", group[FREEZE], cfg.optim.freeze)
            break
    images = f"{len(data.train)} images in batches of {cfg.data.batch_size * cfg.train.accumulate}"
    logger.info(
        f"{cfg.optim.name} lr {cfg.optim.lr:g}, {cfg.schedule.name}, {cfg.train.epochs} epochs of"
        f" {images}"
    )


def _counts(labels: np.ndarray, classes: list[str]) -> str:
    counts = np.bincount(labels, minlength=len(classes))
    listed = "  ".join(
        f"{escape_unprintable(name)}: {count}" for name, count in zip(classes, counts)
    )
    if len(listed) <= MAX_LISTED:
        return listed
    return f"{counts.min()} to {counts.max()} a class"


def _flops_text(flops: int | None) -> str:
    if flops is None:
        return "unknown FLOP"
    for limit, unit in ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if flops >= limit:
            return f"{flops / limit:.3g} {unit}"
    return f"{flops} FLOP"


def log_epoch(run: Run) -> None:
    """The line of the epoch that was just completed; the words before the figures are stable."""
    state, epochs = run.state, run.cfg.train.epochs
    row, best, said = state.history[-1], state.best, "no best"
    quiet = QUIET - {best["metric"] if best else None}
    metrics = "  ".join(
        f"{name} {'n/a' if value is None else format(value, '.4f')}"
        for name, value in row.items()
        if name.startswith(("train_", "val_")) and name not in quiet
    )
    if best:
        said = f"best {best['metric']} {best['value']:.4f} (epoch {best['epoch']})"
    left = np.mean([r["seconds"] for r in state.history[-5:]]) * (epochs - state.epoch)
    logger.info(
        f"epoch {state.epoch}/{epochs}  {metrics}  {said}  lr {row['lr']:.3g}"
        f"  {row['images_per_second']:.0f} images/s  {format_duration(row['seconds'])}  ETA {format_duration(left)}"
    )
    _warn_of_divergence(run)


def _warn_of_divergence(run: Run) -> None:
    """Says at the first epoch of which it is so that the loss is far beyond that of guessing."""
    state, limit = run.state, ABSURD * math.log(max(2, len(run.data.classes)))
    absurd = [row["epoch"] for row in state.history if row["val_loss"] > limit]
    # Of a loss of the user's own nobody knows what guessing costs.
    if run.cfg.loss.name in LOSSES and state.group.is_rank0 and absurd[:1] == [state.epoch]:
        logger.warning(
            f"val_loss {state.history[-1]['val_loss']:.3g} is over {ABSURD} times that of guessing: the run"
            f" diverges; a lower optim.lr, a warm-up or train.clip_grad_norm may help"
        )


def log_finished(cfg: Config, state: TrainingState) -> None:
    """Why there was nothing to train, and what would make it go on."""
    patience = cfg.train.early_stop_patience
    if state.epoch < cfg.train.epochs:
        why, more = f": no improvement in {patience} epochs; to go on", "early_stop_patience=null"
    else:
        why, more = f", after {state.epoch} epochs; for more", f"epochs={2 * state.epoch}"
    logger.info("this run is finished%s, say train.%s", why, more)


def log_test(state: TrainingState, num_images: int) -> None:
    """The result of the run, with the 95 % interval that so many images leave it."""
    best, test = state.best, state.test
    accuracy = with_interval(test["test_acc"], num_images)
    of = f"  (epoch {best['epoch']}, {best['metric']} {best['value']:.4f})" if best else ""
    logger.info("test_loss %.4f  test_acc %s%s", test["test_loss"], accuracy, of)


def model_text(run: Run, flops: int | None) -> str:
    """logs/model.txt: structure, parameters, FLOPs, environment, command line."""
    model = run.state.model
    lines = [str(model), ""]
    for name, parameter in model.named_parameters():
        frozen = "" if parameter.requires_grad else "  frozen"
        shape = "x".join(map(str, parameter.shape))
        lines.append(f"{name:<48} {shape:<16} {parameter.numel():>12,}{frozen}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines += [
        "",
        f"parameters    {sum(p.numel() for p in model.parameters()):,}, trained {trained:,}",
        f"forward pass  {_flops_text(flops)} an image",
        "",
        *(f"{key:<13} {value}" for key, value in run.environment.items()),
        f"{'command':<13} {shlex.join(['python', *sys.argv])}",
    ]
    return "\n".join(lines) + "\n"
