"""What the command lines of evaluate.py and predict.py share. Nothing here imports torch."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cnn import cli, config
from cnn.config import CODE_KEYS, Refused
from cnn.utils import launch

BEST = Path("checkpoints/best.pth")
MAX_NAMED = 5  # checkpoints in a message


def guarded(obey: Callable[[], int]) -> int:
    """Does it; what is refused before anything has begun is one message and its status."""
    if hasattr(sys.stdout, "reconfigure"):  # a console without Chinese letters is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        launch.refuse_several(Path(sys.argv[0]).name)
        return obey()
    except Refused as refusal:
        sys.stderr.write(f"error: {refusal}\n")
        return cli.REFUSED
    except KeyboardInterrupt:  # before cli.run has taken the signals over, or after
        sys.stderr.write("stopped by SIGINT\n")
        return cli.INTERRUPTED


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser that knows --checkpoint."""
    made = argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--checkpoint",
        type=Path,
        default=BEST,
        metavar="FILE",
        help=f"the trained model (default {BEST})",
    )
    return made


def check_settings(words: Sequence[str], allowed: Sequence[str]) -> None:
    """Holds `key=value` words against the settings, of which only some can be changed here.

    Names of code may be typed too, which says that a checkpoint's code is meant to run.

    Raises:
        Refused: with every mistake, a line each.
    """
    config.load_config(None, words)
    for key in (word.partition("=")[0] for word in words):
        if key not in (*allowed, *CODE_KEYS):
            raise Refused(
                f"command line: {key}: cannot be changed here, where only {', '.join(allowed)} can"
            )


def check_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is not there, and names those that are."""
    try:
        if path.exists():
            return
    except (OSError, ValueError):  # a name that no file can have
        pass
    others = sorted(
        other.as_posix()
        for pattern in ("*.pth", "*/best.pth")
        for other in BEST.parent.glob(pattern)
    )
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
