"""Resuming a run: from which checkpoint, and whether the settings and the data fit it."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn import config
from cnn.cli import Command
from cnn.config import Config, as_text
from cnn.config.settings import ASKED, FREE
from cnn.datasets.augment import DRAWS
from cnn.datasets.build import Data
from cnn.datasets.loader import Loader
from cnn.errors import Refused
from cnn.training.state import TrainingState
from cnn.utils.checkpoint import is_end_of_epoch, load_checkpoint, read_checkpoint, read_metadata
from cnn.utils.files import write_atomically
from cnn.utils.importing import is_outside_code
from cnn.utils.run_folder import ARCHIVE, TIME, RunFolder, checkpoints_in, latest_name, new_name
from cnn.utils.screen import align_columns

logger = logging.getLogger(__name__)

# What torch and Python raise when a state dict does not fit the object that loads it.
DOES_NOT_FIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint from which a run resumes, with the settings of the resumed run.

    Attributes:
        path: the file of the checkpoint.
        content: everything that the file contains.
        cfg: the settings of the resumed run.
        changes: the settings that differ from the settings in the checkpoint. Each change is a text
            such as "train.epochs 10 → 20".
    """

    path: Path
    content: dict[str, Any]
    cfg: Config
    changes: tuple[str, ...] = ()


def run_name(command: Command, cfg: Config, *, resumes: bool) -> str | None:
    """Returns the name of the run that a command trains, such as "first".

    A name on the command line (`run=NAME`) is preferred. With `--resume FILE` and without
    `--config`, the next choice is the name in the checkpoint. Otherwise, the name is `cfg.run`.
    With {time} in the name, `--resume` goes on with the run of the file if its name is such a one,
    or with the latest such run; otherwise the name is new.

    Args:
        command: the command line.
        cfg: the settings from the command line and the configuration file.
        resumes: whether the command line has `--resume`.

    Returns:
        The name. The run writes to logs/NAME and checkpoints/NAME. If None, the run writes directly
        to logs/ and checkpoints/.

    Raises:
        Refused: the checkpoint does not exist or is damaged, or a setting is not valid.
    """
    path, name = command.checkpoint, cfg.run
    if path is not None and not command.config:
        try:
            saved = read_metadata(path)
        except Refused:
            saved = load_checkpoint(path)  # its message names a readable file
        check_version(path, saved)
        name = command.load_config(saved["config"], f"checkpoint {path}")[0].run
    if name is None or TIME not in name:
        return name
    return (resumes and latest_name(name, path)) or new_name(name)


def find_checkpoint_to_resume(command: Command, cfg: Config) -> Checkpoint | None:
    """Returns the checkpoint from which to resume, and the settings of the run.

    The checkpoint is the file given after `--resume`. If no file is given there, the latest
    checkpoint of the run is used. The settings come from the file given after `--config`, or from
    the checkpoint if that option is not given. A setting typed on the command line replaces the
    value from the file or the checkpoint.

    Args:
        command: the command line. Its attribute `places`, which tells where each setting was
            found, is updated in place.
        cfg: the settings from the command line and the configuration file. The name of the run is
            `cfg.run`, without {time}.

    Returns:
        An object with the checkpoint and the settings. None if no file is given after `--resume`
        and the run has no checkpoint.

    Raises:
        Refused: if the checkpoint does not exist, is damaged, was written by a newer version, or
            refers to Python code outside the current folder. Also if a setting has changed that
            must stay the same when a run is resumed.
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
    name = cfg.run  # the run may have been renamed with its folder
    cfg, places = command.load_config(base, f"checkpoint {path}")
    cfg = config.with_values(cfg, run=name)
    command.places.clear()
    command.places.update(places)
    changes = check_settings(path, content["config"], cfg, command.typed(), places)
    return Checkpoint(path, content, cfg, tuple(changes))


def readable_checkpoints(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the path and the content of every readable checkpoint.

    For every other checkpoint, a warning is logged.

    Args:
        paths: the files of the checkpoints. Each file is read only when its turn comes.
    """
    for path in paths:
        try:
            yield path, read_checkpoint(path)
        except Refused as refusal:
            logger.warning("%s", refusal)


def latest_checkpoint(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """Returns the path and the content of the latest checkpoint of a run.

    The result is last.pth if last.pth can be read. Otherwise, the result is the readable checkpoint
    with the most optimizer steps.

    Args:
        folder: the folder of the run.

    Returns:
        The path and the content. None if the run has no checkpoint.

    Raises:
        Refused: there are checkpoints, but none can be read.
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
    """Raises Refused if a newer version of this project wrote a checkpoint.

    The augmentations of a newer version draw other random numbers. The run could thus not continue
    unchanged.

    Args:
        path: the file of the checkpoint, for the error message.
        content: the content of the checkpoint. The entry "draws" is the version of the
            augmentations.
    """
    if content.get("draws", 1) > DRAWS:
        raise Refused(f"{path}: written by a newer version of this project, which draws otherwise")


def check_code(path: Path, saved: dict[str, Any], typed: set[str]) -> None:
    """Raises Refused if a checkpoint names code outside the current folder.

    A checkpoint can come from a stranger. A stranger's code must not run without the user's
    consent.

    Args:
        path: the file of the checkpoint, for the error message.
        saved: the settings in the checkpoint, such as {"model": {"name": "package.module:Net"}}.
        typed: the keys of the settings on the command line, such as {"model.name"}. Code in these
            settings is permitted, because the user typed the name of the code.
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
    """Compares the settings of a resumed run with the settings in the checkpoint.

    Args:
        path: the file of the checkpoint, for the error message.
        saved: the settings in the checkpoint, such as {"optim": {"lr": 0.01}}.
        cfg: the settings of the resumed run.
        typed: the keys of the settings on the command line, such as {"optim.lr"}. Some settings may
            change only on the command line.
        places: the place where each setting was found, such as {"optim.lr": "config.yaml:4"}. The
            places are used in the error message.

    Returns:
        The settings that differ, each as a text such as "train.epochs 10 → 20".

    Raises:
        Refused: a setting that may not change differs, or a setting that may change only on the
            command line differs elsewhere.
    """
    # A checkpoint lacks settings that were added later; its run used their defaults.
    then = config.flat(config.to_dict(Config())) | config.flat(saved)
    now = config.flat(config.to_dict(cfg))
    rules = config.resume_rules()
    texts = {k: (as_text(then[k]), as_text(now[k])) for k in rules if then[k] != now[k]}
    verdicts = {key: rules[key] for key in texts}
    for key in [key for key in texts if rules[key] == ASKED]:
        advice = f"type {key}={texts[key][1]} on the command line to change it"
        verdicts[key] = FREE if key in typed else advice
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
    """Returns the first three lines of an error's message, joined into one line.

    Without a message, the name of the error's class is returned.
    """
    lines = str(error).strip().splitlines()[:3]
    return " ".join(line.strip() for line in lines) or type(error).__name__


def restore(state: TrainingState, checkpoint: Checkpoint, data: Data, loader: Loader) -> None:
    """Loads a checkpoint into the state of a run.

    The data must be the data of the checkpoint. If the run is not finished, the result of an
    earlier test is removed from the state.

    Args:
        state: the state of a newly built run, which is changed in place.
        checkpoint: the checkpoint to load.
        data: the images and classes of the resumed run.
        loader: the loader of the training images.

    Raises:
        Refused: the classes, the images, the model or the optimizer do not fit the checkpoint.
    """
    path, content = checkpoint.path, checkpoint.content
    if content["classes"] != data.classes:
        then, now = (", ".join(classes[:10]) for classes in (content["classes"], data.classes))
        raise Refused(f"{path}: expected the classes of its training, {then}; got {now}")
    then, now = content["data"], data.fingerprint()
    if not then.items() <= now.items():
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
    if not state.is_finished(checkpoint.cfg.train):
        # There are more epochs now, and another one may become the best.
        state.test = state.temperature = None
        state.predictions.pop("test", None)


def _check_position(checkpoint: Checkpoint, loader: Loader) -> None:
    """Raises Refused if a checkpoint contains impossible numbers of steps, batches or images.

    Args:
        checkpoint: the checkpoint to check.
        loader: the loader of the training images. The number and the sizes of its batches decide
            what is possible.
    """
    content, accumulate = checkpoint.content, checkpoint.cfg.train.accumulate
    epoch, step, batch = content["epoch"], content["step"], content["unfinished_epoch"]["batch"]
    per_epoch, in_this_one = (-(-number // accumulate) for number in (len(loader), batch))
    images = content["unfinished_epoch"]["sums"]["count"]
    fits = batch <= len(loader) and step == epoch * per_epoch + in_this_one
    if not fits or images > sum(loader.sizes[:batch]):
        position = f"{epoch} epochs and {batch} batches of {len(loader)}"
        raise Refused(f"{checkpoint.path}: step {step} and {images} images do not fit {position}")


def prepare_folder(folder: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Prepares the folder of a run, and archives files that would be overwritten.

    For a new run, all files of an earlier run in the folder are moved to an archive. The same
    happens if the folder contains no checkpoint of the resumed run. Otherwise, only checkpoints
    that are damaged, later than `checkpoint`, or of another run can be moved.

    After a resume, last.pth has the content of `checkpoint`. The file best.pth contains the best
    epoch up to `checkpoint`.

    Args:
        folder: the folder in which the run trains.
        checkpoint: the checkpoint from which the run resumes. None for a new run.

    Raises:
        Refused: a file cannot be moved or copied.
    """
    try:
        paths = folder.saved() if checkpoint is not None else []
        existing = {path: _metadata(path, checkpoint) for path in paths}
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
    """Returns the plain values in a checkpoint, such as the epoch.

    Args:
        path: the file of the checkpoint.
        checkpoint: the checkpoint from which the run resumes. For the path of this checkpoint, the
            content in memory is returned.

    Returns:
        The values by name. None if the file is damaged.
    """
    try:
        return checkpoint.content if path == checkpoint.path else read_metadata(path)
    except Refused:
        return None


def _is_same_run(metadata: dict[str, Any] | None, checkpoint: Checkpoint) -> bool:
    return metadata is not None and metadata["started"] == checkpoint.content["started"]


def _set_others_aside(
    folder: RunFolder, checkpoint: Checkpoint, existing: dict[Path, dict[str, Any] | None]
) -> None:
    """Archives the checkpoints that do not precede the state of the resumed run.

    If the run resumes from last.pth, only checkpoints of other runs are moved. Otherwise, damaged
    checkpoints and checkpoints with more steps are moved as well. The checkpoint of the resumed run
    is then copied to last.pth.

    Args:
        folder: the folder in which the run trains.
        checkpoint: the checkpoint from which the run resumes.
        existing: the plain values, such as the step, of every checkpoint in the folder. None stands
            for a damaged checkpoint.
    """
    exist = folder.last.exists() and checkpoint.path.exists()
    resumes_last = exist and folder.last.samefile(checkpoint.path)
    aside = {}
    for path, metadata in existing.items():
        if metadata is not None and not _is_same_run(metadata, checkpoint):
            aside[path] = "of another run"
        elif resumes_last:
            # A file with more steps was written just before the run was killed. The run will write
            # it again.
            continue
        elif metadata is None:
            aside[path] = "damaged"
        elif metadata["step"] > checkpoint.content["step"]:
            aside[path] = f"further than {checkpoint.path}"
    if aside:
        target = folder.set_aside(list(aside))
        for path, reason in aside.items():
            logger.info("%s is %s; kept as %s", path, reason, target / path.name)
    if not resumes_last and checkpoint.path.exists():
        _copy(checkpoint.path, folder.last)


def _copy(source: Path, target: Path) -> None:
    write_atomically(target, lambda file: file.write(source.read_bytes()))


def _copy_best(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Copies the checkpoint of the best epoch to best.pth.

    The checkpoint is searched in the folder of the run, and in the folder of `checkpoint`. If
    best.pth already contains the best epoch, nothing is copied. If no readable file contains the
    best epoch, a warning is logged.

    Args:
        folder: the folder in which the run trains.
        checkpoint: the checkpoint from which the run resumes. The entry "best" names the best
            epoch. If "best" is None, nothing is done.
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
        with contextlib.suppress(Refused):  # its tensors are damaged; the next file is tried
            if path != checkpoint.path:
                read_checkpoint(path)
            if path != folder.best:
                _copy(path, folder.best)
            return
    gone = f"the weights of the best epoch so far ({best['epoch']}) are not there any more"
    logger.warning("%s: %s", folder.best, gone)
