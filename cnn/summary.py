"""What a run says of itself: the lines at the start, the line of an epoch, model.txt."""

import logging
import shlex
import sys
from pathlib import Path

import numpy as np

from cnn.building import Run
from cnn.config import Config, to_yaml
from cnn.optim import FREEZE
from cnn.resuming import ResumePoint
from cnn.scores import with_interval
from cnn.state import TrainingState
from cnn.utils.environment import differences
from cnn.utils.flops import count_flops
from cnn.utils.logger import write_record
from cnn.utils.progress import duration

logger = logging.getLogger(__name__)

MAX_LISTED = 140  # characters of a line that counts the classes
QUIET = {"val_balanced_acc", "val_f1", "val_top5_acc"}  # in history.csv, not in an epoch's line


def write(cfg: Config, logs: Path, run: Run, point: ResumePoint | None) -> None:
    """Says what the run is, in the log, in config.yaml and in model.txt."""
    if point is not None:
        _log_resume(run, point)
    pre = run.data.preprocessing
    flops = count_flops(run.state.model, (pre.channels, pre.image_size, pre.image_size))
    log_start(cfg, run, flops)
    write_record(logs / "config.yaml", to_yaml(cfg))
    write_record(logs / "model.txt", model_text(run, flops))


def _log_resume(run: Run, point: ResumePoint) -> None:
    state = run.state
    logger.info(
        "==== resumed from %s: epoch %d, step %d, batch %d of %d ====",
        point.path,
        state.epoch + 1,
        state.step,
        state.batch,
        len(run.train_loader),
    )
    if point.changes:
        logger.info("settings changed: %s", "; ".join(point.changes))
    different = differences(point.content["environment"], run.environment)
    if different:
        logger.warning(
            "not as before: %s; the run goes on, equal up to rounding", ", ".join(different)
        )
    if state.group.size != point.content["environment"].get("world_size", 1):
        logger.warning(
            "the images that follow are the same; dropout and BatchNorm, if the model has them, go by"
            " each process's share"
        )


def log_start(cfg: Config, run: Run, flops: int) -> None:
    """At most eight lines: versions and device, data, model, optimizer."""
    data, state, env = run.data, run.state, run.environment
    threads = f" ({env['threads']} threads)" if state.device.type == "cpu" else ""
    logger.info(
        "torch %s on %s%s, %s; seed %d",
        env["torch"],
        env["device"],
        threads,
        env["precision"],
        cfg.seed,
    )
    pre = data.preprocessing
    shape = f"{pre.channels}x{pre.image_size}x{pre.image_size}"
    logger.info("data %s: images %s, %d classes", cfg.data.name, shape, len(data.classes))
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        logger.info("  %-5s %6d  %s", part, len(images), _counts(images.labels, data.classes))
    logger.info(
        "model %s: %s parameters, %s a forward image",
        cfg.model.name,
        f"{sum(p.numel() for p in state.model.parameters()):,}",
        _flops_text(flops),
    )
    for group in state.optimizer.param_groups:
        if state.epoch < group.get(FREEZE, 0):
            logger.info("frozen for the first %d epochs: %s", group[FREEZE], cfg.optim.freeze)
            break
    logger.info(
        "%s lr %g, %s, %d epochs of %d images in batches of %d",
        cfg.optim.name,
        cfg.optim.lr,
        cfg.schedule.name,
        cfg.train.epochs,
        len(data.train),
        cfg.data.batch_size * cfg.train.accumulate,
    )


def _counts(labels: np.ndarray, classes: list[str]) -> str:
    counts = np.bincount(labels, minlength=len(classes))
    listed = "  ".join(f"{name}: {count}" for name, count in zip(classes, counts))
    if len(listed) <= MAX_LISTED:
        return listed
    return f"{counts.min()} to {counts.max()} a class"


def _flops_text(flops: int) -> str:
    for limit, unit in ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if flops >= limit:
            return f"{flops / limit:.3g} {unit}"
    return f"{flops} FLOP"


def log_epoch(state: TrainingState, epochs: int) -> None:
    """The line of the epoch that was just completed; the words before the figures are stable."""
    row, best = state.history[-1], state.best
    said = (
        f"best {best['metric']} {best['value']:.4f} (epoch {best['epoch']})" if best else "no best"
    )
    shown = {name: value for name, value in row.items() if name.startswith(("train_", "val_"))}
    for name in QUIET - {best["metric"] if best else None}:
        shown.pop(name, None)
    metrics = "  ".join(
        f"{name} {'n/a' if value is None else format(value, '.4f')}"
        for name, value in shown.items()
    )
    left = np.mean([r["seconds"] for r in state.history[-5:]]) * (epochs - state.epoch)
    logger.info(
        "epoch %d/%d  %s  %s  lr %.3g  %.0f images/s  %s  ETA %s",
        state.epoch,
        epochs,
        metrics,
        said,
        row["lr"],
        row["images_per_second"],
        duration(row["seconds"]),
        duration(left),
    )


def log_finished(cfg: Config, state: TrainingState) -> None:
    """Why there was nothing to train, and what would make it go on."""
    patience = cfg.train.early_stop_patience
    if state.epoch < cfg.train.epochs:
        logger.info(
            "this run is finished: no improvement in %d epochs; to go on, say"
            " train.early_stop_patience=null",
            patience,
        )
    else:
        logger.info(
            "this run is finished, after %d epochs; for more, say train.epochs=%d",
            state.epoch,
            2 * state.epoch,
        )


def log_test(state: TrainingState, num_images: int) -> None:
    """The result of the run, with the 95 % interval that so many images leave it."""
    best, test = state.best, state.test
    logger.info(
        "test_loss %.4f  test_acc %s%s",
        test["test_loss"],
        with_interval(test["test_acc"], num_images),
        f"  (epoch {best['epoch']}, {best['metric']} {best['value']:.4f})" if best else "",
    )


def model_text(run: Run, flops: int) -> str:
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
