"""Going on with a run: which file, whether it fits what is asked now, and what has changed."""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn import config
from cnn.cli import Command
from cnn.config import Config, Refused
from cnn.datasets import Data
from cnn.state import TrainingState
from cnn.utils.checkpoint import files_of_run, load_checkpoint, read_checkpoint
from cnn.utils.files import write_atomically
from cnn.utils.importing import outside_code
from cnn.utils.run import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on."""

    path: Path
    content: dict[str, Any]  # of the checkpoint
    cfg: Config  # today's settings, found to fit it
    changes: list[str]  # what of them is different, as `key then → now`
    stamp: tuple[int, int] | None = None  # of the file when it was read

    @classmethod
    def read(cls, path: Path, cfg: Config) -> "ResumePoint":
        """The point that a file holds, under settings that are known to fit."""
        return cls(path, load_checkpoint(path), cfg, [])

    def is_outdated(self) -> bool:
        """Whether the file was written anew since it was read."""
        return self.stamp != _stamp(self.path)


def find_resume_point(command: Command, cfg: Config) -> ResumePoint | None:
    """Where `--resume` goes on, and with which settings: the checkpoint's, with those typed now.

    Args:
        cfg: the settings of today's file, which tell the run's folder; with `--config` they count.

    Returns:
        None where the run has nothing to go on from, so that it starts.

    Raises:
        Refused: no such file, a broken one, or settings that do not fit it.
    """
    if command.checkpoint is not None:
        path, stamp = command.checkpoint, _stamp(command.checkpoint)
        content = load_checkpoint(path)
    else:
        folder = RunFolder(cfg.run)
        found = find_checkpoint(folder)
        if found is None:
            logger.info("nothing to go on from in %s; a new run starts", folder.checkpoints)
            return None
        (path, content), stamp = found, None
    base = None if command.config else content["config"]
    if base is not None:
        check_code(path, base, command.typed())
        if command.checkpoint is None:
            base = base | {"run": cfg.run}  # the folder that it was found in, whatever its name was
    with naming(path):
        cfg, places = command.load_config(base)
    command.places.clear()
    command.places.update(places)
    changes = check_settings(path, content["config"], cfg, command.typed(), places)
    return ResumePoint(path, content, cfg, changes, stamp)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has refusals of a checkpoint's settings name the file."""
    try:
        yield
    except Refused as refusal:
        raise Refused(
            re.sub("^checkpoint: ", f"{path}: ", str(refusal), flags=re.MULTILINE)
        ) from None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every write of a checkpoint, which makes a new file under the name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_mtime_ns


def find_checkpoint(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The run's latest file that is whole: last.pth, else the furthest of the others.

    Returns:
        Path and content, or None where the run has no file yet.

    Raises:
        Refused: there are files and none can be read.
    """
    existing = files_of_run(folder.checkpoints)
    if not existing:
        return None
    if existing[0] == folder.last:
        try:
            return folder.last, read_checkpoint(folder.last)
        except Refused as refusal:
            logger.warning("%s", refusal)
    readable = []
    for path in existing:
        if path != folder.last:
            try:
                readable.append((path, read_checkpoint(path)))
            except Refused as refusal:
                logger.warning("%s", refusal)
    if not readable:
        raise Refused(
            f"{folder.checkpoints}: no file of this run can be read; without --resume a new run"
            f" starts, and these are kept in {folder.checkpoints / 'archive'}"
        )
    path, content = max(readable, key=lambda item: item[1]["step"])
    logger.warning("going on from %s instead", path)
    return path, content


def check_code(path: Path, saved: dict[str, Any], typed: set[str]) -> None:
    """Refuses a checkpoint that names code of others to run; a file may come from anybody.

    Args:
        typed: keys given on the command line in this call.

    Raises:
        Refused: unless the name is typed on the command line too.
    """
    for key, name in config.import_paths(saved):
        if key not in typed and outside_code(name):
            raise Refused(
                f"{path}: {key}: names code outside this folder, {name}, and a file may come from"
                f" anybody; if that is what you mean to run, type {key}={name}"
            )


def check_settings(
    path: Path, saved: dict[str, Any], cfg: Config, typed: set[str], places: dict[str, str]
) -> list[str]:
    """Holds today's settings against the checkpoint's.

    Args:
        typed: keys given on the command line in this call.
        places: where each key was given, for the message.

    Returns:
        What is different and taken, each as `key then → now`.

    Raises:
        Refused: what cannot change has changed, or what changes the mathematics was not typed.
    """
    # A key that is younger than the checkpoint was at what is its default.
    then = config.flat(config.to_dict(Config())) | config.flat(saved)
    now = config.flat(config.to_dict(cfg))
    rules = config.resume_rules()
    changed = [key for key in rules if then[key] != now[key]]
    refused = [
        key
        for key in changed
        if rules[key] == config.FIXED or (rules[key] == config.ASKED and key not in typed)
    ]
    if not refused:
        return [f"{key} {_shown(then[key])} → {_shown(now[key])}" for key in changed]
    rows = [("setting", "checkpoint", "now", "")]
    for key in changed:
        verdict = "taken"
        if key in refused:
            asked = f"type {key}={_shown(now[key])} on the command line to change it"
            verdict = "cannot change" if rules[key] == config.FIXED else asked
        rows.append((key, _shown(then[key]), _shown(now[key]), verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])) for row in rows]
    place = places.get(refused[0], "")
    raise Refused(
        f"{place + ': ' if place else ''}{path} was made with other settings:\n"
        + "\n".join("  " + line.rstrip() for line in table)
        + "\n  without --config, a resume takes the checkpoint's settings; a new run is one without"
        " --resume"
    )


def _shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def restore(state: TrainingState, point: ResumePoint, data: Data) -> None:
    """Puts the run where the checkpoint was.

    Raises:
        Refused: the data or the model is another one.
    """
    path, content = point.path, point.content
    if content["classes"] != data.classes:
        raise Refused(
            f"{path}: trained on the classes {', '.join(content['classes'][:10])}; the data now has"
            f" {', '.join(data.classes[:10])}"
        )
    then, now = content["data"], data.fingerprint()
    if then != now:
        counts = ", ".join(
            f"{part} {then[part]} → {now[part]}" for part in ("train", "val", "test")
        )
        if all(then[part] == now[part] for part in ("train", "val", "test")):
            counts = "as many images, but other files, labels, pixels or another order"
        raise Refused(
            f"{path}: the data has changed since ({counts}), so that the run could not go on"
            f" as it was. To begin a new run from its weights: model.weights={path}"
        )
    try:
        state.load_state_dict(content)
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        lines = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in lines[:3]) or type(error).__name__
        raise Refused(
            f"{path}: does not fit the model or optimizer as configured: {reason}"
        ) from None
    cfg = point.cfg.train
    if not state.is_finished(cfg.epochs, cfg.early_stop_patience):
        state.test = None  # there are more epochs now; it will be another best one's
        state.predictions.pop("test", None)


def make_ready(folder: RunFolder, point: ResumePoint | None) -> None:
    """Sees to it that the run writes over nothing of another, nor of itself further on.

    Raises:
        Refused: what is there cannot be put out of the way.
    """
    try:
        if point is None or _is_of_another_run(folder, point):
            where = folder.archive()
            if where is not None:
                logger.info("the earlier run is moved to %s", where)
        if point is not None:
            _set_aside_what_is_ahead(folder, point)
            _bring_best_along(folder, point)
    except OSError as error:
        raise Refused(
            f"{error.filename or folder.checkpoints}: cannot be written, so that an earlier state"
            f" could not be kept: {error.strerror or error}"
        ) from None


def _is_of_another_run(folder: RunFolder, point: ResumePoint) -> bool:
    """Whether the folder holds files, and none of the run that the checkpoint belongs to."""
    for path in files_of_run(folder.checkpoints):
        try:
            if read_checkpoint(path)["started"] == point.content["started"]:
                return False
        except Refused:
            continue
    return folder.has_files()


def _set_aside_what_is_ahead(folder: RunFolder, point: ResumePoint) -> None:
    """Going on from an earlier file than the run's latest: moves what is ahead of it away.

    What is ahead may go another way than the run now will. last.pth is then where the run goes on.
    """
    ahead, damaged = [], []
    for path in files_of_run(folder.checkpoints):
        try:
            if _is_same_file(path, point.path):
                continue
            if read_checkpoint(path)["step"] > point.content["step"]:
                ahead.append(path)
        except Refused:
            damaged.append(path)
    if not ahead and not damaged:
        return
    if _is_same_file(folder.last, point.path):
        return  # what is ahead was written an instant before a kill, and will be again
    target = folder.set_aside(ahead + damaged)
    if point.path.exists():
        _copy(point.path, folder.last)
    for path in ahead:
        logger.info("%s is further than %s; kept as %s", path, point.path, target / path.name)
    for path in damaged:
        logger.info("%s is damaged; kept as %s", path, target / path.name)


def _is_same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        write_atomically(target, lambda new: shutil.copyfileobj(file, new))


def _bring_best_along(folder: RunFolder, point: ResumePoint) -> None:
    """Sees to it that best.pth is the best epoch that the point knows of.

    It may be another: going on in another folder, from an earlier file, or after a damage.
    """
    best = point.content["best"]
    if best is None or _is_epoch(folder.best, best["epoch"], point):
        return
    for path in (*files_of_run(point.path.parent), *files_of_run(folder.checkpoints), point.path):
        if _is_epoch(path, best["epoch"], point):
            _copy(path, folder.best)
            return
    logger.warning(
        "%s: the weights of the best epoch so far (%d) are not there any more",
        folder.best,
        best["epoch"],
    )


def _is_epoch(path: Path, epoch: int, point: ResumePoint) -> bool:
    """Whether the file is whole and holds the end of that epoch of the run."""
    try:
        content = point.content if path == point.path else read_checkpoint(path)
    except Refused:
        return False
    return (content["epoch"], content["unfinished_epoch"]["batch"], content["started"]) == (
        epoch,
        0,
        point.content["started"],
    )
