"""The mistakes that only show between settings."""

import re
from collections.abc import Callable

from cnn.config.settings import Config

# A run without a name shares its folders with those that have one: none may be called as a file, or
# as a folder, that it leaves. Which these are, cnn.utils.run_folder knows; a test holds both together.
FOLDERS_TAKEN = ("archive", "sweeps", "tensorboard")
ENDINGS_TAKEN = (
    *(".log", ".csv", ".yaml", ".txt", ".html", ".png", ".json", ".tmp"),
    *(".pth", ".pt2", ".pt", ".onnx"),
)
MAX_PATTERN = 500  # characters of a regular expression


def check_together(cfg: Config, at: Callable[[str], str]) -> list[str]:
    """The mistakes that only show between keys.

    Args:
        at: gives a key with the place where it was given.
    """
    mistakes = []
    if cfg.run is not None and not re.fullmatch(r"[\w\-][\w.\- ]*", cfg.run):
        mistakes.append(
            f"{at('run')}: expected a name of letters, digits, '.', '_' and '-' that begins with no"
            f" '.', got {cfg.run!r}"
        )
    elif cfg.run is not None and is_taken(cfg.run) and not at("run").startswith("checkpoint"):
        mistakes.append(
            f"{at('run')}: expected a name for folders, got {cfg.run!r}, which a file of the run"
            f" without a name may have"
        )
    if cfg.schedule.name == "multistep" and not cfg.schedule.milestones:
        mistakes.append(
            f"{at('schedule.milestones')}: missing; multistep needs the epochs, such as [30, 60]"
        )
    if cfg.data.sampler == "balanced" and cfg.loss.class_weights == "balanced":
        mistakes.append(
            f"{at('loss.class_weights')}: balanced cannot go with data.sampler: balanced, rare"
            f" classes would count twice over; choose one"
        )
    for number, change in enumerate(cfg.data.augment):
        where = f"{at('data.augment')}[{number}].scale"
        if change.scale is not None and change.name != "resized_crop":
            mistakes.append(f"{where}: is for resized_crop, not for {change.name}")
        elif change.scale is not None and (
            len(change.scale) != 2 or sorted(change.scale) != change.scale
        ):
            mistakes.append(
                f"{where}: expected the least and the largest share of the area, got {change.scale}"
            )
    return mistakes + _check_patterns(cfg, at)


def _check_patterns(cfg: Config, at: Callable[[str], str]) -> list[str]:
    mistakes = []
    patterns = {
        f"{at('optim.groups')}[{number}].match": group.match
        for number, group in enumerate(cfg.optim.groups)
    }
    for where, pattern in (patterns | {at("optim.freeze"): cfg.optim.freeze or ""}).items():
        if len(pattern) > MAX_PATTERN:
            mistakes.append(
                f"{where}: expected at most {MAX_PATTERN} characters, got {len(pattern)}"
            )
            continue
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            mistakes.append(f"{where}: not a regular expression: {error}")
    return mistakes


def is_taken(run: str) -> bool:
    """Whether a file or folder of the run without a name may be called so."""
    run = run.lower()  # there are disks that take Archive for archive
    return run in FOLDERS_TAKEN or run.endswith(ENDINGS_TAKEN)
