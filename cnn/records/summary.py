"""The lines in the log on a run's start, epochs and test, and the text of model.txt."""

import logging
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from cnn.config import Config, DataConfig, to_yaml
from cnn.config.settings import LOSSES
from cnn.datasets.augment import DRAWS
from cnn.metrics.intervals import FEW_GROUPS
from cnn.metrics.scores import format_metric, with_interval
from cnn.models.flops import trace_model
from cnn.records import data_sheet
from cnn.records.evaluation import intervals_of
from cnn.training.optim import FREEZE
from cnn.training.resume import Checkpoint
from cnn.training.run import Run
from cnn.training.state import TrainingState
from cnn.utils.environment import environment_changes
from cnn.utils.files import write_record
from cnn.utils.progress import format_duration
from cnn.utils.screen import escape_unprintable, list_some

logger = logging.getLogger(__name__)

T = TypeVar("T")

PACE_AFTER = 5  # seconds of training

MAX_LISTED = 140  # the most characters of the line with the number of images per class
# A run diverges if its loss is this many times the loss of guessing. For a model that learns
# nothing, or overfits, it stays below 100 times.
DIVERGED = 1000
# Metrics of the test, beside the accuracy, that are in the log.
SAID, SAID_OF_TWO = ("auc", "f1", "balanced_acc"), ("auc", "sensitivity", "specificity")
WIDTH = 100  # columns of the log's line on an epoch; history.csv has the rest
LOSS_AND_ACC = ("loss", "acc")  # of training and validation, in that line
PICTURE = "examples/digit.png"


def write(run: Run, checkpoint: Checkpoint | None) -> None:
    """Logs a summary of a run at its start, and writes config.yaml, model.txt, data.txt and
    division.csv.

    For a run that resumes, the log names the checkpoint and the step.

    Args:
        run: the run that starts or resumes.
        checkpoint: the checkpoint from which the run resumes. None for a new run.
    """
    if checkpoint is not None:
        _log_resume(run, checkpoint)
    flops, outputs = trace_model(run.state.model, run.data.preprocessing.shape)
    log_start(run, flops)
    logs = run.folder.logs
    write_record(logs.config, to_yaml(run.cfg))
    write_record(logs.model, model_text(run, flops, outputs))
    write_record(logs.data, data_sheet.sheet(run))
    write_record(logs.division, data_sheet.division(run))


def _log_resume(run: Run, checkpoint: Checkpoint) -> None:
    state, saved = run.state, checkpoint.content
    at = f"epoch {state.epoch + 1}, step {state.step}, batch {state.batch}"
    at += f" of {len(run.train_loader)}"
    if state.is_finished(run.cfg.train):
        at = f"finished after epoch {state.epoch}, step {state.step}"
    logger.info("==== resumed from %s: %s ====", checkpoint.path, at)
    if state.epoch > run.cfg.train.epochs:
        fewer = f"more than train.epochs={run.cfg.train.epochs}"
        logger.warning("%d epochs are done, %s: nothing is trained", state.epoch, fewer)
    if checkpoint.changes:
        logger.info("settings changed: %s", "; ".join(checkpoint.changes))
    draws = saved.get("draws", 1)  # older files lack it
    if draws != DRAWS and checkpoint.cfg.data.augment:
        logger.warning(
            f"random changes to images are drawn in a new way since this file was written"
            f" (draws {draws} → {DRAWS}), and so in the rest of the run"
        )
    different = ", ".join(environment_changes(saved["environment"], run.environment))
    if different:
        logger.warning("not as before: %s; the run resumes, equal up to rounding", different)
    if run.group.size != saved["environment"].get("world_size", 1):
        logger.warning("the next images are the same; dropout and BatchNorm go by process")


def log_start(run: Run, flops: int | None) -> None:
    """Logs the versions, device, data, model and optimizer of a run.

    Args:
        run: the run.
        flops: the floating-point operations of a forward pass per image. None if the number is
            unknown.
    """
    cfg, data, state, env = run.cfg, run.data, run.state, run.environment
    device = env["device"]
    if state.device.type == "cpu":
        device += f" ({env['threads']} threads)"
    device += f", {run.group.size} processes" if run.group.size > 1 else ""
    logger.info("torch %s on %s, %s; seed %d", env["torch"], device, env["precision"], cfg.seed)
    shape = "x".join(map(str, data.preprocessing.shape))
    facts = data_sheet.facts(run)
    logger.info("data %s: images %s, %d classes", facts["source"], shape, len(data.classes))
    for split, images in data.splits.items():
        counts, names = _class_counts(images.labels, data.classes), images.group_names
        groups = "" if names is None else f"  groups: {len(set(names))}"
        logger.info("  %-5s %6d  %s%s", split, len(images), counts, groups)
    if (names := data.train.group_names) is not None:
        largest = Counter(names.tolist()).most_common(1)[0][0]
        some = list_some([data.train.name(row) for row in np.flatnonzero(names == largest)], 3)
        alone = "; no group has two images: is this meant?" if len(set(names)) == len(names) else ""
        logger.info("  group %s: %s%s", *map(escape_unprintable, (largest, some)), alone)
    if len(data.classes) == 2:
        negative, positive = map(escape_unprintable, data.classes)
        hint = "" if cfg.data.positive else f" (the second by name; else data.positive={negative})"
        logger.info("  positive: %s%s", positive, hint)
    if "formats" in facts:  # images in memory have none
        told = [f"{name} {facts[name]}" for name in data_sheet.IN_LOG if name in facts]
        logger.info("  %s", "; ".join(told))
    size = f"{sum(p.numel() for p in state.model.parameters()):,} parameters"
    logger.info("model %s: %s, %s per image", cfg.model.name, size, _format_flops(flops))
    frozen = max(group.get(FREEZE, 0) for group in state.optimizer.param_groups)
    if state.epoch < frozen:
        logger.info("frozen for the first %d epochs: %s", frozen, cfg.optim.freeze or "backbone")
    size, number = cfg.data.batch_size * cfg.train.accumulate, sum(run.train_loader.sizes)
    rise = f" after {state.schedule.warmup_steps} steps of warm-up"
    schedule = f"{cfg.schedule.name}{rise if state.schedule.warmup_steps else ''}"
    schedule += f", {cfg.train.epochs} epochs of {number} images in batches of {size}"
    rates = [group["initial_lr"] for group in state.optimizer.param_groups]
    slow = f" ({min(rates):.3g} to {max(rates):.3g} by part)" if min(rates) < max(rates) else ""
    logger.info("%s lr %g%s, %s", cfg.optim.name, cfg.optim.lr, slow, schedule)
    _log_hints(run)


def _log_hints(run: Run) -> None:
    """Logs what the settings make of the rates and the metrics, where this may surprise."""
    cfg, data, state = run.cfg, run.data, run.state
    if cfg.data.name in ("digits", "synthetic") and cfg.data.root != DataConfig().root:
        advice = "a folder of images needs --config configs/folder.yaml or data.name=folder"
        logger.warning("data.root is not used by data.name=%s; %s", cfg.data.name, advice)
    if state.schedule.warmup_steps > state.schedule.steps and not run.folder.scratch:
        advice = "a shorter schedule.warmup_steps or schedule.warmup_epochs lets it"
        what = f"lr is not reached in the {state.schedule.steps} steps of this run"
        logger.warning(
            "the warm-up takes %d steps: %s; %s", state.schedule.warmup_steps, what, advice
        )
    share, is_weighted = cfg.loss.label_smoothing, cfg.loss.class_weights is not None
    if share and not is_weighted and cfg.loss.name in LOSSES:
        rest = share / len(data.classes)
        targets = np.array([1 - share + rest, *[rest] * (len(data.classes) - 1)])
        least = -(targets * np.log(targets)).sum()
        logger.info(
            "with label smoothing %g, no loss is below %.4f, and none goes to 0", share, least
        )
    if cfg.train.mixup or cfg.train.cutmix:
        logger.info("of two mixed images, train_acc counts the label with the larger share")


def log_pace(run: Run, steps: Iterable[T]) -> Iterator[T]:
    """Yields the steps of an epoch, and logs once how long the run will take.

    The line comes after `PACE_AFTER` seconds, if the epoch is not over by then.

    Args:
        run: the run.
        steps: the steps of the epoch, the first of which is not typical.
    """
    start, is_told = None, False
    for number, step in enumerate(steps):
        yield step
        start = start or time.monotonic()
        seconds = time.monotonic() - start
        if number and seconds > PACE_AFTER and not is_told:
            is_told, epochs = True, run.cfg.train.epochs
            epoch = seconds / number * run.state.schedule.steps_per_epoch
            whole = f"train.epochs={epochs} about {format_duration(epoch * epochs)}"
            logger.info("an epoch's training takes about %s, %s", format_duration(epoch), whole)


def _class_counts(labels: np.ndarray, classes: list[str]) -> str:
    counts = np.bincount(labels, minlength=len(classes))
    text = "  ".join(f"{escape_unprintable(name)}: {count}" for name, count in zip(classes, counts))
    return text if len(text) <= MAX_LISTED else f"{counts.min()} to {counts.max()} per class"


def _format_flops(flops: int | None) -> str:
    return "unknown FLOP" if flops is None else f"{flops / 1e6:,.2f} MFLOP"


def log_epoch(run: Run) -> None:
    """Logs the latest epoch in one line.

    A warning follows if the validation loss has exceeded a limit for the first time. The limit is
    1000 times the loss of a model that guesses. With the user's own loss function, there is no
    warning.

    Args:
        run: the run, with at least one completed epoch.
    """
    state, row = run.state, run.state.history[-1]
    logger.info("%s", epoch_line(run))
    limit = DIVERGED * math.log(max(2, len(run.data.classes)))  # guessing has loss ln(classes)
    diverged = [row["epoch"] for row in state.history if row["val_loss"] > limit]
    is_ours = run.cfg.loss.name in LOSSES  # else the loss of guessing is unknown
    if is_ours and diverged[:1] == [state.epoch] and run.group.is_rank0:
        logger.warning(
            f"val_loss {row['val_loss']:.3g} is over {DIVERGED} times that of guessing: the run"
            f" diverges; a lower optim.lr, a warm-up or train.clip_grad_norm may help"
        )


def epoch_line(run: Run) -> str:
    """Returns a text of at most 100 columns on the latest epoch.

    The number of the best epoch, and then the estimated time to the end, are left out if they do
    not fit.
    """
    state, epochs = run.state, run.cfg.train.epochs
    row, best = state.history[-1], state.best

    def of(split: str, names: Iterable[str]) -> str:
        texts = (f"{name} {format_metric(row.get(f'{split}_{name}'))}" for name in names)
        return " ".join([split, *texts])

    monitored = run.cfg.checkpoint.monitor.removeprefix("val_")
    third = monitored if monitored not in LOSS_AND_ACC or "val_auc" not in row else "auc"
    left = np.mean([r["seconds"] for r in state.history[-5:]]) * (epochs - state.epoch)
    parts = [f"epoch {state.epoch}/{epochs}", of("train", LOSS_AND_ACC)]
    parts += [of("val", dict.fromkeys([*LOSS_AND_ACC, third])), f"lr {row['lr']:.3g}"]
    parts += [f"ETA {format_duration(left)}", f"best {best['epoch']}" if best else "no best"]
    while len("  ".join(parts)) > WIDTH and len(parts) > 3:  # with the metrics
        parts.pop()
    return "  ".join(parts)


def log_finished(cfg: Config, state: TrainingState) -> None:
    """Logs why a run is finished, and a setting that continues the run.

    Args:
        cfg: the settings of the run.
        state: the state of the run after the last epoch.
    """
    if state.epoch < cfg.train.epochs:
        patience = cfg.train.early_stop_patience
        why = f"no improvement in {patience} epochs; to continue: train.early_stop_patience=null"
    else:
        why = f"{state.epoch} epochs are done; for more: train.epochs={2 * state.epoch}"
    logger.info("this run is finished: %s", why)


def log_test(run: Run) -> None:
    """Logs the loss, the accuracy and further metrics of the final test, with 95 % intervals.

    Args:
        run: the run after the test.
    """
    best, test, ends = run.state.best, run.state.test, intervals_of(run, "test")
    accuracy = with_interval(test["test_acc"], ends.get("acc"))
    epoch = f"  (epoch {best['epoch']}, {best['metric']} {best['value']:.4f})" if best else ""
    logger.info("test_loss %.4f  test_acc %s%s", test["test_loss"], accuracy, epoch)
    for name in SAID_OF_TWO if len(run.data.classes) == 2 else SAID:
        logger.info("  %-13s %s", name, with_interval(test[f"test_{name}"], ends.get(name)))
    if "test_ece_before" in test:
        names = ("test_ece_before", "test_ece", "test_log_loss_before", "test_log_loss")
        text = "  by the temperature %.3f (fitted on val): ece %s → %s, log_loss %s → %s"
        logger.info(text, run.state.temperature, *(with_interval(test[n], None) for n in names))
    groups = run.data.test.group_names
    if groups is not None and (number := len(set(groups))) < FEW_GROUPS:
        logger.info("test has %d groups; below %d, the intervals are rough", number, FEW_GROUPS)


def log_next(run: Run) -> None:
    """Logs where the report and the best checkpoint are, and a command that uses the model."""
    folder, data = run.folder, run.cfg.data
    if folder.scratch:
        return
    if folder.logs.report.is_file():
        logger.info("report: %s", folder.logs.report)
    if run.state.best is None or not folder.best.is_file():
        return
    logger.info("best checkpoint: %s (epoch %d)", folder.best, run.state.best["epoch"])
    wanted = [PICTURE] if data.name in ("digits", "mnist") else [run.data.test.name(0)]
    picture = next((name for name in wanted if Path(name).is_file()), "PICTURE")
    model = ["--checkpoint", folder.best.as_posix()] if run.cfg.run else []
    is_picture = run.data.preprocessing.channels in (1, 3)
    script = ["predict.py", *model, picture] if is_picture else ["evaluate.py", *model]
    logger.info("next: %s", shlex.join(["python", *script]))


def model_text(run: Run, flops: int | None, outputs: list[tuple[str, tuple[int, ...]]]) -> str:
    """Returns the text of model.txt.

    The text lists the layers, the shapes of their outputs for one image, and the parameters of the
    model. The FLOPs of a forward pass, the environment and the command line follow.

    Args:
        run: the run, which contains the model and the environment.
        flops: the floating-point operations of a forward pass per image. None if the number is
            unknown.
        outputs: the name and the output's shape of each layer.
    """
    model = run.state.model
    lines = [str(model), "", f"{'layer':<48} output"]
    lines += [f"{name:<48} {'x'.join(map(str, shape))}" for name, shape in outputs]
    lines += ["", f"{'parameter':<48} {'shape':<16} {'number':>12}"]
    for name, parameter in model.named_parameters():
        frozen = "" if parameter.requires_grad else "  frozen"
        shape = "x".join(map(str, parameter.shape))
        lines.append(f"{name:<48} {shape:<16} {parameter.numel():>12,}{frozen}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines += [
        "",
        f"parameters    {sum(p.numel() for p in model.parameters()):,}, trained {trained:,}",
        f"forward pass  {_format_flops(flops)} per image",
        "",
        *(f"{key:<13} {value}" for key, value in run.environment.items()),
        f"{'command':<13} {shlex.join(['python', *sys.argv])}",
    ]
    return "\n".join(lines) + "\n"
