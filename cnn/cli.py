"""The skeleton of every script: how a command line becomes work, and how the work ends.

A script prepares, without torch, so that a mistake is answered in a tenth of a second, and what it
has prepared is run with log and signals set up. However that ends, it is told in one message and an
exit status: 0 done, 1 failed, 2 refused, 128 + N stopped by signal N.
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
from typing import TYPE_CHECKING, Any

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
    """What a command line asks for, found possible.

    Attributes:
        run: does it; may give an exit status of its own.
        places: where each setting was given; a refusal that begins with one is told with it.
        module: what it needs of ours; with torch beneath, that takes seconds to import.
        hint: what is said after the reason where it is stopped or fails.
    """

    run: Callable[["Log", "StopSignals"], int | None]
    places: dict[str, str] = field(default_factory=dict)
    module: str = "torch"
    hint: str = ""


def main(
    prepare: Callable[[list[str]], Task | None],
    argv: list[str] | None,
    *,
    prefix: str = "error: ",
    several: bool = False,
) -> int:
    """Runs a script; gives its exit status.

    Args:
        prepare: reads the command line; gives None where nothing is left to be done.
        argv: the command line; None: this process's.
        prefix: of what is refused before anything has begun.
        several: whether torchrun may start it in several processes.
    """
    open_missing_streams()
    if hasattr(sys.stdout, "reconfigure"):  # a console without Chinese letters is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            if not several:
                launch.refuse_multiple_processes(Path(sys.argv[0]).name)
            task = prepare(sys.argv[1:] if argv is None else argv)
            return DONE if task is None else run_command(task, is_last=argv is None)
        except (Refused, RunError) as error:
            from cnn.utils.screen import LINES, escape_unprintable

            if launch.find_launch().is_rank0:
                sys.stderr.write(f"{prefix}{escape_unprintable(error, keep=LINES)}\n")
            return error.status
    except KeyboardInterrupt:  # before `run_command` has taken the signals over
        sys.stderr.write("stopped by SIGINT\n")
        return Stopped(signal.SIGINT).status


def run_command(task: Task, *, is_last: bool = False) -> int:
    """Does the work with log and signals set up; turns how it ended into a message and a status.

    Args:
        is_last: nothing comes after it in this process, so that no signal is of use any more.
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
    if processes.size > 1:  # looked for unused parameters, found none: no news
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        # Two seconds of importing torch, in which a signal waits: no half of a module is left, and
        # nobody's `except Exception` there takes it.
        with garbage_collection_paused():
            importlib.import_module(task.module)
        stop.deferred = False
        stop.check()
        return task.run(log, stop) or DONE
    except (Exception, Stopped) as error:  # noqa: BLE001  it is told
        stop.is_outcome_known = True  # no call, before which a signal would be looked at
        return _tell(error, task, stop)
    finally:
        stop.is_outcome_known = True
        log.close()
        stop.uninstall(is_last=is_last)


def _tell(error: BaseException, task: Task, stop: "StopSignals") -> int:
    """Says how it ended; gives the exit status."""
    if isinstance(error, (Refused, RunError)):
        key = re.match(r"[a-z_]+\.[a-z_]+|\w+", str(error))
        place = task.places.get(key.group()) if key and isinstance(error, Refused) else None
        if not isinstance(error, RefusedElsewhere):
            hint = task.hint if isinstance(error, RunError) else ""
            logger.error("%s%s%s", f"{place}: " if place else "", error, hint)
        return error.status
    if stop.was_raised:  # and what it came in the middle of has fallen over it
        error = Stopped(stop.received)
    if isinstance(error, Stopped):
        logger.warning("stopped by %s%s", error, task.hint)
        return error.status
    logger.error("failed", exc_info=error)
    return FAILED


# -- command lines -------------------------------------------------------------------------------


class Command(argparse.Namespace):
    """What a command line says; each script has its own, with its options.

    Attributes:
        settings: key=value, as typed.
        config: the file after --config, where it was given.
        checkpoint: the file that it goes on from, or uses.
        places: where each setting in force was given.
    """

    settings: list[str]
    config: Path | None
    checkpoint: Path | None

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def typed(self) -> set[str]:
        """The keys given on the command line."""
        return {setting.partition("=")[0] for setting in self.settings}

    def load_config(self, base: dict[str, Any] | None = None) -> tuple[Config, dict[str, str]]:
        """Today's settings, checked, and where each was given.

        Args:
            base: a checkpoint's settings, which then stand in for the default file.
        """
        path = self.config or (default_config() if base is None else None)
        return load_config(path, self.settings, base)


def default_config() -> Path:
    """configs/config.yaml here, or else the one beside train.py."""
    here = Path("configs/config.yaml")
    return here if here.exists() else Path(__file__).resolve().parents[1] / here


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of a script's docstring."""
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def checkpoint_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows --checkpoint."""
    made = parser(name, description)
    about = f"the trained model (default {BEST})"
    made.add_argument("--checkpoint", type=Path, default=BEST, metavar="FILE", help=about)
    return made


def check_settings(words: Sequence[str], allowed: Sequence[str]) -> None:
    """Holds `key=value` words against the settings, of which only some can be changed here.

    Names of code may be typed too, which says that a checkpoint's code is meant to run.

    Raises:
        Refused: with every mistake, a line each.
    """
    load_config(None, words)
    for key in (word.partition("=")[0] for word in words):
        if key not in (*allowed, *code_keys()):
            raise Refused(
                f"command line: {key}: cannot be changed here, where only {', '.join(allowed)} can"
            )


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is not there, and names those that are."""
    if os.path.exists(path):  # False for a name that no file can have, where Path raises
        return
    found = [f for pattern in ("*.pth", f"*/{BEST.name}") for f in BEST.parent.glob(pattern)]
    others = sorted(file.as_posix() for file in found)
    advice = "train first: python train.py"
    if others:
        more = ", ..." if len(others) > MAX_NAMED else ""
        advice = f"--checkpoint takes one of {', '.join(others[:MAX_NAMED])}{more}"
    raise Refused(f"{path}: no such file; {advice}")


def check_output(option: str, path: Path) -> None:
    """Refuses a file that cannot be written, before the work and not after it."""
    if not path.parent.is_dir():
        raise Refused(f"{option}: expected a file in a folder that exists, got {path}")
    if path.exists() and not path.is_file():
        raise Refused(f"{option}: expected a file, got {path}, which is a folder or a device")
