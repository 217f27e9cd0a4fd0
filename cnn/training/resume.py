"""Going on with a run: which file, whether it fits what is asked now, and what has changed."""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cnn import config
from cnn.cli import Command
from cnn.config import Config, as_text
from cnn.config.settings import ASKED, FIXED, FREE
from cnn.datasets.augment import DRAWS
from cnn.datasets.build import Data
from cnn.datasets.loader import Loader
from cnn.errors import Refused
from cnn.training.state import TrainingState
from cnn.utils.checkpoint import is_end_of_epoch, load_checkpoint, read_checkpoint
from cnn.utils.files import write_atomically
from cnn.utils.importing import is_outside_code
from cnn.utils.run_folder import ARCHIVE, RunFolder, checkpoints_in
from cnn.utils.screen import align_columns

logger = logging.getLogger(__name__)

# What torch and Python raise where something is loaded into what it was not saved from.
DOES_NOT_FIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run goes on."""

    path: Path
    content: dict[str, Any]  # of the checkpoint
    cfg: Config  # today's settings, found to fit it
    changes: tuple[str, ...] = ()  # what of them is different, as `key then → now`
    stamp: tuple[int, int] | None = None  # of the file when it was read

    def is_outdated(self) -> bool:
        """Whether the file was written anew since it was read."""
        return self.stamp != _stamp(self.path)


def find_checkpoint_to_resume(command: Command, cfg: Config) -> Checkpoint | None:
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
        found = latest_checkpoint(folder)
        if found is None:
            logger.info("nothing to go on from in %s; a new run starts", folder.checkpoints)
            return None
        (path, content), stamp = found, None
    if content.get("draws", 1) > DRAWS:
        raise Refused(f"{path}: written by a newer version of this project, which draws otherwise")
    base = None if command.config else content["config"]
    if base is not None:
        check_code(path, base, command.typed())
        if command.checkpoint is None:
            base = base | {"run": cfg.run}  # the folder that it was found in, whatever its name was
    with naming(path):
        cfg, places = command.load_config(base)
    command.places.clear()
    command.places.update(placed(places, path))
    changes = check_settings(path, content["config"], cfg, command.typed(), places)
    return Checkpoint(path, content, cfg, tuple(changes), stamp)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has refusals of a checkpoint's settings name the file."""
    try:
        yield
    except Refused as refusal:
        raise Refused(
            re.sub("^checkpoint: ", f"{path}: ", str(refusal), flags=re.MULTILINE)
        ) from None


def placed(places: dict[str, str], path: Path) -> dict[str, str]:
    """Where each setting was given, those of the checkpoint by its name."""
    return {key: str(path) if place == "checkpoint" else place for key, place in places.items()}


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every write of a checkpoint, which makes a new file under the name."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_mtime_ns


def latest_checkpoint(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The run's latest file that is whole: last.pth, else the furthest of the others.

    Returns:
        Path and content, or None where the run has no file yet.

    Raises:
        Refused: there are files and none can be read.
    """
    readable = []
    for path in folder.saved():
        try:
            readable.append((path, read_checkpoint(path)))
        except Refused as refusal:
            logger.warning("%s", refusal)
        if path == folder.last and readable:
            return readable[0]
    if not readable:
        if not folder.saved():
            return None
        raise Refused(
            f"{folder.checkpoints}: no file of this run can be read; without --resume a new run"
            f" starts, and these are kept in {folder.checkpoints / ARCHIVE}"
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
        if key not in typed and is_outside_code(name):
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
    untyped = {key for key in changed if rules[key] == ASKED and key not in typed}
    refused = [key for key in changed if rules[key] == FIXED or key in untyped]
    shown = {key: (as_text(then[key]), as_text(now[key])) for key in changed}
    if not refused:
        return [f"{key} {before} → {after}" for key, (before, after) in shown.items()]
    rows = [("setting", "checkpoint", "now", "")]
    for key, (before, after) in shown.items():
        asked = f"type {key}={after} on the command line to change it"
        rows.append(
            (
                key,
                before,
                after,
                asked if key in untyped else rules[key] if key in refused else FREE,
            )
        )
    place = places.get(refused[0], "").removeprefix("checkpoint")
    raise Refused(
        f"{place + ': ' if place else ''}{path} was made with other settings:\n"
        + "\n".join(f"  {line}" for line in align_columns(rows))
        + "\n  without --config, a resume takes the checkpoint's settings; a new run is one without"
        " --resume"
    )


def restore(state: TrainingState, point: Checkpoint, data: Data, loader: Loader) -> None:
    """Puts the run where the checkpoint was.

    Args:
        loader: of the training images.

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
        parts = ("train", "val", "test")
        counts = ", ".join(f"{part} {then[part]} → {now[part]}" for part in parts)
        if all(then[part] == now[part] for part in parts):
            counts = "as many images, but other files, labels, pixels or another order"
        raise Refused(
            f"{path}: the data has changed since ({counts}), so that the run could not go on"
            f" as it was. To begin a new run from its weights: model.weights={path}"
        )
    _check_place(point, loader)
    try:
        state.load_state_dict(content)
    except DOES_NOT_FIT as error:
        lines = str(error).strip().splitlines()
        reason = " ".join(line.strip() for line in lines[:3]) or type(error).__name__
        raise Refused(
            f"{path}: does not fit the model or optimizer as configured: {reason}"
        ) from None
    cfg = point.cfg.train
    if not state.is_finished(cfg.epochs, cfg.early_stop_patience):
        state.test = None  # there are more epochs now; it will be another best one's
        state.predictions.pop("test", None)


def _check_place(point: Checkpoint, loader: Loader) -> None:
    """Refuses a place that no run over these batches comes to."""
    content, accumulate = point.content, point.cfg.train.accumulate
    epoch, step, batch = content["epoch"], content["step"], content["unfinished_epoch"]["batch"]
    of_epoch, of_this_one = (-(-number // accumulate) for number in (len(loader), batch))
    images = content["unfinished_epoch"]["sums"]["count"]
    fits = batch <= len(loader) and step == epoch * of_epoch + of_this_one
    if not fits or images > sum(loader.sizes[:batch]):
        raise Refused(
            f"{point.path}: step {step} and {images} images do not fit {epoch} epochs and {batch}"
            f" batches of {len(loader)}"
        )


def prepare_folder(folder: RunFolder, point: Checkpoint | None) -> None:
    """Sees to it that the run writes over nothing of another, nor of itself further on.

    Raises:
        Refused: what is there cannot be put out of the way.
    """
    try:
        here = _places(folder.saved(), point) if point else {}
        if not any(place and place.started == point.content["started"] for place in here.values()):
            here, where = {}, folder.archive()
            if where is not None:
                logger.info("the earlier run is moved to %s", where)
        if point is not None:
            _set_others_aside(folder, point, here)
            _bring_best_along(folder, point)
    except OSError as error:
        raise Refused(
            f"{error.filename or folder.checkpoints}: cannot be written, so that an earlier state"
            f" could not be kept: {error.strerror or error}"
        ) from None


class _Place(NamedTuple):
    """Where a checkpoint stands in which run."""

    started: str
    step: int


def _read(path: Path, point: Checkpoint) -> dict[str, Any] | None:
    """The content of a checkpoint; None where it is damaged."""
    try:
        return point.content if path == point.path else read_checkpoint(path)
    except Refused:
        return None


def _places(paths: list[Path], point: Checkpoint) -> dict[Path, _Place | None]:
    """Where each of the checkpoints stands; None for one that is damaged."""
    contents = ((path, _read(path, point)) for path in paths)
    return {path: c and _Place(c["started"], c["step"]) for path, c in contents}


def _set_others_aside(
    folder: RunFolder, point: Checkpoint, here: dict[Path, _Place | None]
) -> None:
    """Moves away what the run would write over: what is ahead of the file that it goes on from.

    What is ahead may go another way than the run now will. last.pth is then where the run goes on.
    """
    step, started = point.content["step"], point.content["started"]
    # Where last.pth goes on, what is ahead was written an instant before a kill, and will be again.
    goes_on = _is_same_file(folder.last, point.path)
    aside = {}
    for path, at in here.items():
        if at is not None and at.started != started:
            aside[path] = "of another run"
        elif at is None and not goes_on:
            aside[path] = "damaged"
        elif not goes_on and at.step > step and not _is_same_file(path, point.path):
            aside[path] = f"further than {point.path}"
    if aside:
        target = folder.set_aside(list(aside))
        for path, reason in aside.items():
            logger.info("%s is %s; kept as %s", path, reason, target / path.name)
    if not goes_on and point.path.exists():
        _copy(point.path, folder.last)


def _is_same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        write_atomically(target, lambda new: shutil.copyfileobj(file, new))


def _bring_best_along(folder: RunFolder, point: Checkpoint) -> None:
    """Sees to it that best.pth is the best epoch that the point knows of.

    It may be another: going on in another folder, from an earlier file, or after a damage.
    """
    best, started = point.content["best"], point.content["started"]
    if best is None:
        return
    beside = [point.path.with_name(folder.best.name), *checkpoints_in(point.path.parent)]
    for path in (folder.best, *beside, *folder.saved(), point.path):
        content = _read(path, point)
        if content is not None and is_end_of_epoch(content, started, best["epoch"]):
            if path != folder.best:
                _copy(path, folder.best)
            return
    gone = "the weights of the best epoch so far (%d) are not there any more"
    logger.warning(f"%s: {gone}", folder.best, best["epoch"])
