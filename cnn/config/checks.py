"""Checks of a whole configuration, after the type and the limits of each value were checked."""

import math
import re
from collections.abc import Callable, Iterator

from cnn.config.settings import AUGMENTATIONS, Config

# A run without a name writes into logs/ and checkpoints/, where each named run has a folder. So no
# run may be named like a file or folder that cnn.utils.run_folder writes there. A test compares the
# pattern with these names.
TAKEN_NAMES = re.compile(
    r"archive|sweeps|tensorboard|.*\.(log|csv|yaml|txt|html|png|json|tmp|pth|pt2?|onnx)",
    re.IGNORECASE,  # some file systems take Archive and archive for the same name
)
MAX_PATTERN = 500  # characters of a regular expression


def check_config(cfg: Config, at: Callable[[str], str]) -> Iterator[str]:
    """Yields a message for each mistake in a configuration.

    The types and the limits of the values have been checked before. Examples of other mistakes are
    the schedule "multistep" without schedule.milestones, and an invalid regular expression.

    Args:
        cfg: the configuration.
        at: a function that gets a dotted key such as "optim.lr" and returns the beginning of a
            message. The beginning is the place where the key was given and the key, such as
            "configs/a.yaml:4: optim.lr". For a key that was not given, the beginning is the key
            alone.
    """
    if cfg.run is not None:
        yield from _check_run(cfg.run, at("run"))
    if cfg.schedule.name == "multistep" and not cfg.schedule.milestones:
        yield f"{at('schedule.milestones')}: missing; multistep needs the epochs, such as [30, 60]"
    if cfg.data.sampler == "balanced" and cfg.loss.class_weights == "balanced":
        where = at("loss.class_weights")  # with both, a rare class would be weighted twice
        yield f"{where}: balanced cannot go with data.sampler: balanced; choose one"
    if cfg.data.value_range is not None and not is_value_range(cfg.data.value_range):
        expected = f"two numbers, the smaller one first, got {cfg.data.value_range}"
        yield f"{at('data.value_range')}: expected {expected}"
    if (cfg.data.folds is None) != (cfg.data.fold is None):
        missing, given = ("folds", "fold") if cfg.data.folds is None else ("fold", "folds")
        yield f"{at('data.' + given)}: needs data.{missing}, too; with 5 folds, fold 0 to fold 4"
    elif cfg.data.folds is not None and cfg.data.fold >= cfg.data.folds:
        last = cfg.data.folds - 1
        yield f"{at('data.fold')}: expected at most {last} (data.folds - 1), got {cfg.data.fold}"
    yield from _check_augment(cfg, at)
    yield from _check_patterns(cfg, at)


def is_value_range(value: list[float]) -> bool:
    """Returns whether a list consists of two numbers that rise, with a finite difference."""
    return len(value) == 2 and value[0] < value[1] and math.isfinite(value[1] - value[0])


def _check_run(run: str, where: str) -> Iterator[str]:
    if not re.fullmatch(r"(\{time\}|[\w\-])(\{time\}|[\w.\- ])*", run):
        expected = "a name of letters, digits, '_', '-', inner '.' and {time}"
        yield f"{where}: expected {expected}, got {run!r}"
    elif TAKEN_NAMES.fullmatch(run) and not where.startswith("checkpoint "):
        yield f"{where}: expected a name for folders, not that of a run's file, got {run!r}"


def _check_augment(cfg: Config, at: Callable[[str], str]) -> Iterator[str]:
    for index, change in enumerate(cfg.data.augment):
        where = f"{at('data.augment')}[{index}]"
        for name, value in change.arguments().items():
            if name not in AUGMENTATIONS.get(change.name, ("args",)):
                takers = ", ".join(key for key, names in AUGMENTATIONS.items() if name in names)
                yield f"{where}.{name}: is for {takers or 'your own'}, not for {change.name}"
            elif isinstance(value, list) and (len(value) != 2 or value[0] > value[1]):
                yield f"{where}.{name}: expected the smallest and the largest value, got {value}"
        if change.name == "resized_crop" in [before.name for before in cfg.data.augment[:index]]:
            yield f"{where}: resized_crop is done first, and only once"


def _check_patterns(cfg: Config, at: Callable[[str], str]) -> Iterator[str]:
    groups, freeze = at("optim.groups"), at("optim.freeze")
    for number, group in enumerate(cfg.optim.groups):
        if (group.part is None) == (group.match is None):
            yield f"{groups}[{number}]: expected part (head or backbone) or match, one of the two"
    patterns = {f"{groups}[{n}].match": g.match or "" for n, g in enumerate(cfg.optim.groups)}
    patterns |= {freeze: cfg.optim.freeze or "", at("data.group"): cfg.data.group or ""}
    for where, pattern in patterns.items():
        if len(pattern) > MAX_PATTERN:
            yield f"{where}: expected at most {MAX_PATTERN} characters, got {len(pattern)}"
            continue
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{where}: expected a regular expression, got {pattern!r}: {error}"
