"""Resuming a run: from which checkpoint, and whether it fits today's settings and data."""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn import config
from cnn.cli import Command
from cnn.config import Config, as_text
from cnn.config.settings import ASKED, FIXED, FREE
from cnn.datasets.augment import DRAWS
from cnn.datasets.build import Data
from cnn.datasets.loader import Loader
from cnn.errors import Refused
from cnn.training.state import TrainingState
from cnn.utils.checkpoint import is_end_of_epoch, load_checkpoint, read_checkpoint, read_metadata
from cnn.utils.files import write_atomically
from cnn.utils.importing import is_outside_code
from cnn.utils.run_folder import ARCHIVE, RunFolder, checkpoints_in
from cnn.utils.screen import align_columns

logger = logging.getLogger(__name__)

# What torch and Python raise where a state dict is loaded into something else.
DOES_NOT_FIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint from which a run resumes.

    Attributes:
        cfg: today's settings, found to fit the checkpoint.
        changes: settings that differ from the checkpoint's, as `key then → now`.
    """

    path: Path
    content: dict[str, Any]
    cfg: Config
    changes: tuple[str, ...] = ()


def run_name(command: Command, cfg: Config) -> str | None:
    """Returns the name of the run that will be written: the checkpoint's, if one is given.

    Raises:
        Refused: no such checkpoint, or a damaged one.
    """
    path = command.checkpoint
    if path is None or command.config:
        return cfg.run
    try:
        saved = read_metadata(path)
    except Refused:
        saved = load_checkpoint(path)  # its message names a file that can be read
    check_version(path, saved)
    return command.load_config(saved["config"], f"checkpoint {path}")[0].run


def find_checkpoint_to_resume(command: Command, cfg: Config) -> Checkpoint | None:
    """Reads the checkpoint that `--resume` names, or the run's latest, and checks the settings.

    The settings are the checkpoint's with those typed now, or with `--config` the file's.

    Args:
        cfg: the settings of today's file, which name the run's folder.

    Returns:
        None where the run has no checkpoint yet, so that it starts.

    Raises:
        Refused: no such file, a damaged one, or settings that do not fit it.
    """
    if command.checkpoint is not None:
        path, content = command.checkpoint, load_checkpoint(command.checkpoint)
    else:
        folder = RunFolder(cfg.run)
        found = latest_checkpoint(folder)
        if found is None:
            logger.info("nothing to go on from in %s; a new run starts", folder.checkpoints)
            return None
        path, content = found
    check_version(path, content)
    base = None if command.config else content["config"]
    if base is not None:
        check_code(path, base, command.typed())
        if command.checkpoint is None:
            base = base | {"run": cfg.run}  # the run may have been renamed with its folder
    cfg, places = command.load_config(base, f"checkpoint {path}")
    command.places.clear()
    command.places.update(places)
    changes = check_settings(path, content["config"], cfg, command.typed(), places)
    return Checkpoint(path, content, cfg, tuple(changes))


def readable_checkpoints(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields path and content of each checkpoint; logs a warning for one that cannot be read."""
    for path in paths:
        try:
            yield path, read_checkpoint(path)
        except Refused as refusal:
            logger.warning("%s", refusal)


def latest_checkpoint(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """Reads last.pth of a run or, where it is damaged, the readable checkpoint with most steps.

    Returns:
        Path and content, or None where the run has no checkpoint yet.

    Raises:
        Refused: there are checkpoints and none can be read.
    """
    paths = folder.saved()
    if not paths:
        return None
    readable = readable_checkpoints(paths)
    first = next(readable, None)
    if first is None:
        advice = f"without --resume a new run starts, and these are kept in {ARCHIVE}/ there"
        raise Refused(f"{folder.checkpoints}: no file of this run can be read; {advice}")
    if first[0] == folder.last:
        return first
    path, content = max(itertools.chain([first], readable), key=lambda item: item[1]["step"])
    logger.warning("going on from %s instead", path)
    return path, content


def check_version(path: Path, content: dict[str, Any]) -> None:
    """Refuses a checkpoint of a later version, whose augmentations draw in another way."""
    if content.get("draws", 1) > DRAWS:
        raise Refused(f"{path}: written by a newer version of this project, which draws otherwise")


def check_code(path: Path, saved: dict[str, Any], typed: set[str]) -> None:
    """Refuses a checkpoint whose settings name code outside this folder.

    Args:
        typed: keys given on the command line, which allow the code that they name.
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
    """Compares today's settings with the checkpoint's.

    Args:
        typed: keys given on the command line.
        places: where each key was given, for the message.

    Returns:
        The changes, each as `key then → now`.

    Raises:
        Refused: a setting has changed that cannot, or that has to be typed to change.
    """
    # The checkpoint lacks keys that are younger: those had their defaults.
    then = config.flat(config.to_dict(Config())) | config.flat(saved)
    now = config.flat(config.to_dict(cfg))
    rules = config.resume_rules()
    texts = {k: (as_text(then[k]), as_text(now[k])) for k in rules if then[k] != now[k]}
    verdicts = {key: FREE for key in texts}
    for key, (_, after) in texts.items():
        if rules[key] == FIXED:
            verdicts[key] = FIXED
        elif rules[key] == ASKED and key not in typed:
            verdicts[key] = f"type {key}={after} on the command line to change it"
    refused = [key for key, verdict in verdicts.items() if verdict != FREE]
    if not refused:
        return [f"{key} {before} → {after}" for key, (before, after) in texts.items()]
    rows = [("setting", "checkpoint", "now", "")]
    rows += [(key, *texts[key], verdict) for key, verdict in verdicts.items()]
    checkpoint = f"checkpoint {path}"
    place = places.get(refused[0], checkpoint)
    raise Refused(
        f"{'' if place == checkpoint else place + ': '}{path} was made with other settings:\n"
        + "\n".join(f"  {line}" for line in align_columns(rows))
        + "\n  without --config, a resume takes the checkpoint's settings; a new run is one without"
        " --resume"
    )


def reason_of(error: Exception) -> str:
    """Returns the first three lines of an error's message as one."""
    lines = str(error).strip().splitlines()[:3]
    return " ".join(line.strip() for line in lines) or type(error).__name__


def restore(state: TrainingState, checkpoint: Checkpoint, data: Data, loader: Loader) -> None:
    """Loads the state of a checkpoint.

    Args:
        loader: of the training images.

    Raises:
        Refused: the data, the model or the optimizer is another one.
    """
    path, content = checkpoint.path, checkpoint.content
    if content["classes"] != data.classes:
        then, now = (", ".join(classes[:10]) for classes in (content["classes"], data.classes))
        raise Refused(f"{path}: expected the classes of its training, {then}; got {now}")
    then, now = content["data"], data.fingerprint()
    if then != now:
        sizes = [f"{part} {then[part]} → {now[part]}" for part in ("train", "val", "test")]
        if all(then[part] == now[part] for part in ("train", "val", "test")):
            sizes = ["as many images, but other files, labels, pixels or another order"]
        raise Refused(
            f"{path}: the data has changed since ({', '.join(sizes)}), so that the run could not go"
            f" on as it was. To begin a new run from its weights: model.weights={path}"
        )
    _check_position(checkpoint, loader)
    try:
        state.load_state_dict(content)
    except DOES_NOT_FIT as error:
        what = "does not fit the model or optimizer as configured"
        raise Refused(f"{path}: {what}: {reason_of(error)}") from None
    cfg = checkpoint.cfg.train
    if not state.is_finished(cfg.epochs, cfg.early_stop_patience):
        state.test = None  # there are more epochs now, and another one may become the best
        state.predictions.pop("test", None)


def _check_position(checkpoint: Checkpoint, loader: Loader) -> None:
    """Refuses numbers of steps and images that no run over these batches reaches."""
    content, accumulate = checkpoint.content, checkpoint.cfg.train.accumulate
    epoch, step, batch = content["epoch"], content["step"], content["unfinished_epoch"]["batch"]
    per_epoch, in_this_one = (-(-number // accumulate) for number in (len(loader), batch))
    images = content["unfinished_epoch"]["sums"]["count"]
    fits = batch <= len(loader) and step == epoch * per_epoch + in_this_one
    if not fits or images > sum(loader.sizes[:batch]):
        position = f"{epoch} epochs and {batch} batches of {len(loader)}"
        raise Refused(f"{checkpoint.path}: step {step} and {images} images do not fit {position}")


def prepare_folder(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Moves away checkpoints that the run would overwrite: another run's, or its own further ones.

    Raises:
        Refused: they cannot be moved.
    """
    try:
        existing = {}
        if checkpoint is not None:
            existing = {path: _metadata(path, checkpoint) for path in folder.saved()}
        if not any(_is_same_run(metadata, checkpoint) for metadata in existing.values()):
            existing, archive = {}, folder.archive()
            if archive is not None:
                logger.info("the earlier run is moved to %s", archive)
        if checkpoint is not None:
            _set_others_aside(folder, checkpoint, existing)
            _copy_best(folder, checkpoint)
    except OSError as error:
        place, reason = error.filename or folder.checkpoints, error.strerror or error
        what = "cannot be written, so that an earlier state is not kept"
        raise Refused(f"{place}: {what}: {reason}") from None


def _metadata(path: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Returns the plain values of a file, without reading its tensors; None where it is damaged."""
    try:
        return checkpoint.content if path == checkpoint.path else read_metadata(path)
    except Refused:
        return None


def _is_same_run(metadata: dict[str, Any] | None, checkpoint: Checkpoint) -> bool:
    return metadata is not None and metadata["started"] == checkpoint.content["started"]


def _set_others_aside(
    folder: RunFolder, checkpoint: Checkpoint, existing: dict[Path, dict[str, Any] | None]
) -> None:
    """Moves away what is further than the checkpoint, damaged or of another run.

    What is further may have gone another way. Then makes last.pth the checkpoint. Where last.pth is
    it already, what is further was written just before a kill, and will be written again.
    """
    resumes_last = _is_same_file(folder.last, checkpoint.path)
    reasons = {}
    for path, metadata in existing.items():
        if metadata is None:
            reasons[path] = None if resumes_last else "damaged"
        elif not _is_same_run(metadata, checkpoint):
            reasons[path] = "of another run"
        elif metadata["step"] > checkpoint.content["step"] and not resumes_last:
            is_this = _is_same_file(path, checkpoint.path)
            reasons[path] = None if is_this else f"further than {checkpoint.path}"
    aside = {path: reason for path, reason in reasons.items() if reason}
    if aside:
        target = folder.set_aside(list(aside))
        for path, reason in aside.items():
            logger.info("%s is %s; kept as %s", path, reason, target / path.name)
    if not resumes_last and checkpoint.path.exists():
        _copy(checkpoint.path, folder.last)


def _is_same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        write_atomically(target, lambda new: shutil.copyfileobj(file, new))


def _copy_best(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Makes best.pth the best epoch that the checkpoint names.

    It may be another one in another folder, after a resume from an earlier file, or be damaged.
    """
    best, started = checkpoint.content["best"], checkpoint.content["started"]
    if best is None:
        return
    parent = checkpoint.path.parent
    paths = [folder.best, parent / folder.best.name, *checkpoints_in(parent), *folder.saved()]
    for path in dict.fromkeys([*paths, checkpoint.path]):
        metadata = _metadata(path, checkpoint)
        if metadata is None or not is_end_of_epoch(metadata, started, best["epoch"]):
            continue
        with contextlib.suppress(Refused):  # its tensors are damaged: look further
            if path != checkpoint.path:
                read_checkpoint(path)
            if path != folder.best:
                _copy(path, folder.best)
            return
    gone = f"the weights of the best epoch so far ({best['epoch']}) are not there any more"
    logger.warning("%s: %s", folder.best, gone)
