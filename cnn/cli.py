"""Runs the scripts: reads the command line, sets up log and signal handlers, reports errors.

A script's `prepare` function reads the command line without importing torch, so that a mistake is
reported in a tenth of a second. It returns a Task, which `run_command` executes. Every error ends
in one message and an exit status: 0 done, 1 failed, 2 refused, 128 + N stopped by signal N.
"""

import argparse
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cnn.config import Config, code_keys, load_config
from cnn.errors import Refused, RefusedElsewhere, RunError, Stopped
from cnn.utils import launch
from cnn.utils.run_folder import RunFolder
from cnn.utils.streams import discard_unwritable_stderr, open_missing_streams

if TYPE_CHECKING:
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)

DONE, FAILED, REFUSED = 0, RunError.status, Refused.status

BEST = RunFolder(None).best
MAX_NAMED = 5  # checkpoints in a message


@dataclass(frozen=True)
class Task:
    """The work that a command line asks for.

    Attributes:
        run: the function that does the work. The function gets the log and the signal handlers. The
            function returns an exit status, or None for success.
        places: the place where each setting was given, such as {"optim.lr": "configs/a.yaml:4"}. If
            a Refused message begins with the name of a setting, the place of the setting is logged
            first.
        module: the name of a module that `run` needs. The module is imported before `run` is
            called.
        hint: a text that is logged after the message when a signal stops the work or when `run`
            raises RunError.
    """

    run: Callable[["Log", "StopSignals"], int | None]
    places: dict[str, str] = field(default_factory=dict)
    module: str = "torch"
    hint: str = ""


Prepare = Callable[[list[str]], Task | None]


def main(prepare: Prepare, argv: list[str] | None, *, distributed: bool = False) -> int:
    """Runs a script and returns the exit status of the script.

    Args:
        prepare: a function that gets the arguments of the command line. The function returns the
            work to do, or None if nothing is left to do.
        argv: the arguments of the command line; None for the arguments in `sys.argv`. With None,
            the process ignores signals after this call and should end.
        distributed: whether torchrun may start the script in several processes. If False, a script
            in several processes is refused.
    """
    open_missing_streams()
    if hasattr(sys.stdout, "reconfigure"):  # for a console without Chinese characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            if not distributed:
                launch.refuse_multiple_processes(Path(sys.argv[0]).name)
            task = prepare(sys.argv[1:] if argv is None else argv)
            return DONE if task is None else run_command(task, is_last=argv is None)
        except (Refused, RunError) as error:
            from cnn.utils.screen import LINES, escape_unprintable

            if launch.find_launch().is_rank0:
                sys.stderr.write(f"error: {escape_unprintable(error, keep=LINES)}\n")
            return error.status
    except KeyboardInterrupt:  # before `run_command` installed its signal handlers
        sys.stderr.write("stopped by SIGINT\n")
        return Stopped(signal.SIGINT).status


def run_command(task: Task, *, is_last: bool = False) -> int:
    """Executes a task and returns the exit status.

    The log and the signal handlers are set up before the task starts. An error of the task is
    logged.

    Args:
        task: the work to do.
        is_last: whether the process ends after this call. If True, the process ignores signals
            after the task. If False, the earlier signal handlers are restored after the task.
    """
    from cnn.utils.importing import garbage_collection_paused
    from cnn.utils.logger import Log
    from cnn.utils.memory import keep_freed_memory
    from cnn.utils.signals import StopSignals, stop_with_parent

    keep_freed_memory()
    processes = launch.find_launch()
    stop = StopSignals(deferred=True)
    stop.install()
    stop_with_parent()
    log = Log(processes.rank)
    if processes.size > 1:  # hides DDP's warning that it found no unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        # A signal waits for the two seconds of importing torch, so that it neither leaves a module
        # half imported nor is caught by an `except Exception` there.
        with garbage_collection_paused():
            importlib.import_module(task.module)
        stop.deferred = False
        stop.check()
        return task.run(log, stop) or DONE
    except (Exception, Stopped) as error:  # noqa: BLE001  it is logged
        # This is an assignment because a signal handler may run before a call, but not before it.
        stop.is_outcome_known = True
        return _log_error(error, task, stop)
    finally:
        stop.is_outcome_known = True
        log.close()
        if is_last:
            discard_unwritable_stderr()
        stop.uninstall(is_last=is_last)


def _log_error(error: BaseException, task: Task, stop: "StopSignals") -> int:
    """Logs the error that ended a task and returns the exit status.

    If a signal interrupted the task, the signal is logged instead of the error. But a Refused or a
    RunError is logged even then. A RefusedElsewhere is not logged, since another process logs the
    cause. The notes of the error follow, such as the command that goes on with the run.

    Args:
        error: the exception that ended the task.
        task: the task. Its `places` and its `hint` complete the message.
        stop: the signal handlers.
    """
    notes = getattr(error, "__notes__", [])
    if stop.was_raised and not isinstance(error, (Refused, RunError)):
        error = Stopped(stop.received)  # the signal may have made a clean-up fail
    if isinstance(error, Stopped):
        logger.warning("stopped by %s%s", error, task.hint)
    elif isinstance(error, RunError):
        logger.error("%s%s", error, task.hint)
    elif isinstance(error, Refused):
        key = re.match(r"[a-z_.]*", str(error)).group()
        place = f"{task.places[key]}: " if key in task.places else ""
        if not isinstance(error, RefusedElsewhere):
            logger.error("%s%s", place, error)
    elif kernel := re.match(r"(\w+) does not have a deterministic implementation", str(error)):
        # The message of torch is longer, and names no setting.
        reason = f"{kernel[1]}, which this model uses, has no repeatable implementation here"
        logger.error("train.deterministic: %s; take another model, or say false", reason)
    else:
        logger.error("failed", exc_info=error)
        if sys.version_info >= (3, 11):
            notes = []  # they stand below the traceback
    for note in notes:
        logger.warning("%s", note)
    return error.status if isinstance(error, (Refused, RunError, Stopped)) else FAILED


# -- command lines -------------------------------------------------------------------------------


class Command(argparse.Namespace):
    """The parsed command line of a script.

    Each script adds its own options in a subclass.

    Attributes:
        settings: the typed settings of the form `key=value`, such as ["optim.lr=0.01"].
        config: the path of the YAML file given with --config; None without this option.
        checkpoint: the path of the checkpoint file to load or to resume from; None for no
            checkpoint.
        places: the place where each setting was given, such as {"optim.lr": "configs/a.yaml:4"}.
            The dict is empty at first.
    """

    settings: list[str]
    config: Path | None
    checkpoint: Path | None

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def typed(self) -> set[str]:
        """Returns the keys of the settings typed on the command line, such as {"optim.lr"}."""
        return {setting.partition("=")[0] for setting in self.settings}

    def load_config(
        self, base: dict[str, Any] | None = None, base_name: str = ""
    ) -> tuple[Config, dict[str, str]]:
        """Reads the settings and checks their values.

        Settings typed on the command line replace the settings of the file given with --config.
        Both replace the settings of `base`. If neither --config nor `base` is given, the file
        configs/config.yaml is read.

        Args:
            base: the settings of a checkpoint, such as {"optim": {"lr": 0.01}}; None for no
                checkpoint.
            base_name: the place to report for the settings of `base`, such as "checkpoint a.pth".

        Returns:
            A pair. The first item is the configuration. The second item is the place where each
            setting was given, such as {"optim.lr": "configs/a.yaml:4"}.

        Raises:
            Refused: there are mistakes in the settings.
        """
        path = self.config
        if path is None and base is None:
            here = Path("configs/config.yaml")
            path = here if here.exists() else Path(__file__).resolve().parents[1] / here
        return load_config(path, self.settings, base, base_name)


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises Refused for a mistake.

    Args:
        name: the name of the script, such as "train.py".
        description: a text for --help, printed with its line breaks.
    """

    def __init__(self, name: str, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(name, None, description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises Refused for a mistake in the command line.

        Args:
            message: what is wrong.

        Raises:
            Refused: always.
        """
        raise Refused(f"{message}; see {self.prog} --help")

    def add_checkpoint(self) -> None:
        """Adds the option --checkpoint FILE to the parser.

        The default of the option is checkpoints/best.pth.
        """
        text = f"trained model (default: {BEST})"
        self.add_argument("--checkpoint", type=Path, default=BEST, metavar="FILE", help=text)

    def add_settings(self, which: str) -> None:
        """Adds the positional argument `settings` to the parser.

        The argument takes any number of words of the form `key=value`.

        Args:
            which: a description of the settings that the user can change. The option --help prints
                the description.
        """
        options = {"nargs": "*", "default": [], "metavar": "key=value"}
        self.add_argument("settings", **options, help=f"settings to change: {which}")


def check_settings(words: Sequence[str], allowed: Sequence[str]) -> None:
    """Checks the typed settings of a script that accepts only some settings.

    Every script accepts a setting that can name code of the user, such as model.name. By typing
    such a setting, the user permits code that a checkpoint names.

    Args:
        words: the typed settings, such as ["device=cpu"].
        allowed: the keys of the settings that the script accepts, such as ["device"].

    Raises:
        Refused: a value is wrong, or the script does not accept a setting.
    """
    load_config(None, words)
    for key in (word.partition("=")[0] for word in words):
        if key not in (*allowed, *code_keys()):
            reason = f"cannot be changed here, where only {', '.join(allowed)} can"
            raise Refused(f"command line: {key}: {reason}")


def check_checkpoint(path: Path) -> None:
    """Checks that a checkpoint file exists.

    Args:
        path: the path of the file.

    Raises:
        Refused: the file does not exist. The message names up to five existing files in the folder
            checkpoints/ and its subfolders.
    """
    if os.path.exists(path):  # returns False for a name that no file can have; Path.exists raises
        return
    patterns = ("*.pth", f"*/{BEST.name}")
    found = sorted(file.as_posix() for pattern in patterns for file in BEST.parent.glob(pattern))
    if not found:
        raise Refused(f"{path}: no such file; train first: python train.py")
    names = ", ".join(found[:MAX_NAMED]) + (", ..." if len(found) > MAX_NAMED else "")
    raise Refused(f"{path}: no such file; --checkpoint takes one of {names}")
