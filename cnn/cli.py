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
from cnn.utils.streams import open_missing_streams

if TYPE_CHECKING:
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)

DONE, FAILED, REFUSED = 0, RunError.status, Refused.status

BEST = RunFolder(None).best
MAX_NAMED = 5  # checkpoints in a message


@dataclass(frozen=True)
class Task:
    """The work that a command line asks for, after the command line has been checked.

    Attributes:
        run: the function that does the work. It is called with the log and the signal handlers. It
            returns an exit status, or None for success.
        places: the place where each setting was given, such as {"optim.lr": "configs/a.yaml:4"}. If
            `run` raises Refused with a message that begins with the name of such a setting, the
            place is logged before the message.
        module: the name of a module to import before `run` is called. The module imports torch,
            which takes seconds.
        hint: a text that is logged after the message if a signal stops the work or `run` raises
            RunError.
    """

    run: Callable[["Log", "StopSignals"], int | None]
    places: dict[str, str] = field(default_factory=dict)
    module: str = "torch"
    hint: str = ""


Prepare = Callable[[list[str]], Task | None]


def main(prepare: Prepare, argv: list[str] | None, *, distributed: bool = False) -> int:
    """Runs a script and returns its exit status.

    Args:
        prepare: a function that gets the arguments of the command line. It returns the work to do,
            or None if nothing is left to do.
        argv: the arguments of the command line; None to take them from `sys.argv`. With None, the
            process should end after this call, since it ignores signals from then on.
        distributed: whether torchrun may start the script in several processes.
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
    """Executes a task and returns its exit status.

    The log and the signal handlers are set up first. An error of the task is logged.

    Args:
        task: the work.
        is_last: whether the process ends after this call. If True, signals are ignored after the
            task. If False, the earlier signal handlers are restored after the task.
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
        stop.uninstall(is_last=is_last)


def _log_error(error: BaseException, task: Task, stop: "StopSignals") -> int:
    """Logs the error that ended a task and returns the exit status.

    If a signal interrupted the task, the signal is logged instead of the error, unless the error is
    a Refused or a RunError.

    Args:
        error: the exception that the task raised.
        task: the task; its `places` and its `hint` complete the message.
        stop: the signal handlers.
    """
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
        return FAILED
    else:
        logger.error("failed", exc_info=error)
        return FAILED
    return error.status


# -- command lines -------------------------------------------------------------------------------


class Command(argparse.Namespace):
    """The parsed command line of a script; each script adds its own options in a subclass.

    Attributes:
        settings: the words of the form `key=value`, such as "optim.lr=0.01".
        config: the YAML file given with --config; None if this option is not used.
        checkpoint: the checkpoint file to resume from or to load; None if the script starts without
            a checkpoint.
        places: the place where each setting was given, such as {"optim.lr": "configs/a.yaml:4"}.
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
        """Reads and checks the settings, and returns them with the place where each was given.

        Settings typed on the command line replace those of the file given with --config. Both
        replace those of `base`. If neither --config nor `base` is given, the file
        configs/config.yaml is read.

        Args:
            base: the settings of a checkpoint, such as {"optim": {"lr": 0.01}}; None if there is no
                checkpoint.
            base_name: the place to report for the settings of `base`, such as "checkpoint a.pth".

        Returns:
            The configuration, and a dict of the places, such as {"optim.lr": "configs/a.yaml:4"}.

        Raises:
            Refused: there are mistakes in the settings.
        """
        path = self.config
        if path is None and base is None:
            here = Path("configs/config.yaml")
            path = here if here.exists() else Path(__file__).resolve().parents[1] / here
        return load_config(path, self.settings, base, base_name)


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises Refused for a mistake instead of ending the process.

    Args:
        name: the name of the script, such as "train.py".
        description: a text for --help, which keeps its line breaks.
    """

    def __init__(self, name: str, description: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(name, None, description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises Refused for a mistake in the command line.

        The method of the base class would print the usage and end the process.

        Args:
            message: what is wrong.
        """
        raise Refused(f"{message}; see {self.prog} --help")

    def add_checkpoint(self) -> None:
        """Adds the option --checkpoint FILE, whose default is checkpoints/best.pth."""
        text = f"trained model (default: {BEST})"
        self.add_argument("--checkpoint", type=Path, default=BEST, metavar="FILE", help=text)

    def add_settings(self, which: str) -> None:
        """Adds the positional argument `settings`, which takes any number of words `key=value`.

        Args:
            which: a description of the settings that can be changed, shown by --help.
        """
        options = {"nargs": "*", "default": [], "metavar": "key=value"}
        self.add_argument("settings", **options, help=f"settings to change: {which}")


def check_settings(words: Sequence[str], allowed: Sequence[str]) -> None:
    """Checks the words `key=value` of a script in which only some settings can be changed.

    A setting that may name code of the user, such as model.name, can be changed in every script. By
    typing it, the user allows the code to run that a checkpoint names.

    Args:
        words: the typed words, such as "device=cpu".
        allowed: the keys of the settings that can be changed.

    Raises:
        Refused: a value is wrong, or a setting cannot be changed.
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
        Refused: the file does not exist. The message names up to five files that exist in the
            folder checkpoints/.
    """
    if os.path.exists(path):  # returns False for a name that no file can have; Path.exists raises
        return
    patterns = ("*.pth", f"*/{BEST.name}")
    found = sorted(file.as_posix() for pattern in patterns for file in BEST.parent.glob(pattern))
    if not found:
        raise Refused(f"{path}: no such file; train first: python train.py")
    names = ", ".join(found[:MAX_NAMED]) + (", ..." if len(found) > MAX_NAMED else "")
    raise Refused(f"{path}: no such file; --checkpoint takes one of {names}")


def check_output(option: str, path: Path) -> None:
    """Checks that a file can be written, before the work that produces it starts.

    Args:
        option: the option that names the file, such as "--csv"; the message begins with it.
        path: the path of the file, which may exist already.

    Raises:
        Refused: the folder of the file does not exist, or the path is a folder or a device.
    """
    if not path.parent.is_dir():
        raise Refused(f"{option}: expected a file in a folder that exists, got {path}")
    if path.exists() and not path.is_file():
        raise Refused(f"{option}: expected a file, got {path}, which is a folder or a device")
