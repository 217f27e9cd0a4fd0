"""The command line of train.py, and how a run ends: exit status and the words before it."""

import argparse
import logging
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn import config
from cnn.config import Config, Refused

if TYPE_CHECKING:
    from cnn.utils.logger import Log
    from cnn.utils.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

DONE, FAILED, REFUSED = 0, 1, 2  # and 128 + N for signal N
INTERRUPTED = 128 + signal.SIGINT


def default_config() -> Path:
    """configs/config.yaml here, or else the one beside train.py."""
    here = Path("configs/config.yaml")
    return here if here.exists() else Path(__file__).resolve().parents[1] / here


@dataclass(frozen=True)
class Command:
    """What was asked for on the command line."""

    config: Path | None  # --config, where it was given
    settings: list[str]  # key=value, as typed
    resume: bool
    checkpoint: Path | None  # the file after --resume
    dry_run: bool
    drill: bool
    find_lr: bool
    print_config: bool
    places: dict[str, str] = field(default_factory=dict)  # where each setting in force was given

    def load_config(self, base: dict[str, Any] | None = None) -> tuple[Config, dict[str, str]]:
        """Today's settings, checked, and where each was given.

        Args:
            base: a checkpoint's settings, which then stand in for the default file.
        """
        path = self.config or (default_config() if base is None else None)
        return config.load_config(path, self.settings, base)

    def typed(self) -> set[str]:
        """The keys given on the command line."""
        return {setting.partition("=")[0] for setting in self.settings}


def parse(argv: list[str], description: str) -> Command:
    """Reads the command line; ends with exit status 2 and the usage where it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="settings (default configs/config.yaml)")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or the latest")
    add("--dry-run", action="store_true", help="two batches of everything, in a scratch folder")
    add("--drill", action="store_true", help="kill a short run of yours and compare every bit")
    add("--find-lr", action="store_true", help="try ever higher learning rates, suggest one")
    add("--print-config", action="store_true", help="print every setting with its meaning")
    add("settings", nargs="*", metavar="key=value", help="change a setting: optim.lr=0.01")
    args, unknown = parser.parse_known_intermixed_args(_separate(argv))
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; settings are written"
            f" {_as_setting(unknown[0], argv)}"
        )
    for word in args.settings:
        if word.endswith((".yaml", ".yml")):
            parser.error(f"expected key=value, got {word!r}; settings of a file: --config {word}")
        if "=" not in word:
            parser.error(
                f"expected key=value, got {word!r} (a file goes after --config or --resume)"
            )
    modes = ("dry_run", "drill", "find_lr", "print_config")
    asked = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(args, mode)]
    if args.resume is not None and asked:
        parser.error(f"{asked[0]} cannot go with --resume: it looks at settings, and at no run")
    return Command(
        config=args.config,
        settings=args.settings,
        resume=args.resume is not None,
        checkpoint=Path(args.resume) if args.resume else None,
        dry_run=args.dry_run,
        drill=args.drill,
        find_lr=args.find_lr,
        print_config=args.print_config,
    )


def _separate(argv: list[str]) -> list[str]:
    """Keeps `--resume key=value` from taking the setting for a file."""
    return [
        "--resume=" if word == "--resume" and "=" in following else word
        for word, following in zip(argv, [*argv[1:], ""])
    ]


def _as_setting(option: str, argv: list[str]) -> str:
    """`--epochs 5` as `train.epochs=5`."""
    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        following = argv[argv.index(option) + 1 :][:1] if option in argv else []
        value = following[0] if following and not following[0].startswith("--") else "..."
    known = [key for key in config.resume_rules() if name in (key, key.rpartition(".")[2])]
    return f"{known[0]}={value}" if known else "key=value: train.epochs=5"


def run(act: Callable[["Log", "StopSignals"], int | None], places: dict[str, str]) -> int:
    """Runs `act` with log and signals set up; turns how it ended into a message and a status.

    Args:
        act: may give an exit status of its own.
        places: where each setting was given; a refusal that begins with one is told with it.
    """
    from cnn.utils.importing import collector_paused
    from cnn.utils.launch import find_launch
    from cnn.utils.logger import Log
    from cnn.utils.memory import keep_freed_memory
    from cnn.utils.signals import Stopped, StopSignals

    keep_freed_memory()
    launch = find_launch()
    log, stop = Log(launch.rank), StopSignals(deferred=True)
    stop.install()
    if launch.size > 1:  # looked for unused parameters, found none: no news
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Two seconds of importing torch, in which a signal waits: no half of a module is left, and
    # nobody's `except Exception` there takes it.
    with collector_paused():
        from cnn.datasets.loading import DataFailed
        from cnn.distributed import Elsewhere, Lost
        from cnn.saving import Failed

    stop.deferred = False
    try:
        stop.check()
        return act(log, stop) or DONE
    except Elsewhere:
        return REFUSED
    except Refused as refusal:
        key = re.match(r"[a-z_]+\.[a-z_]+|\w+", str(refusal))
        place = places.get(key.group()) if key else None
        logger.error("%s%s", f"{place}: " if place else "", refusal)
        return REFUSED
    except Stopped as stopped:
        return _say_stopped(stopped)
    except (Failed, DataFailed, Lost) as failure:
        logger.error("%s", failure)
        return FAILED
    except Exception:
        if stop.raised:  # and what it came in the middle of has fallen over it
            return _say_stopped(Stopped(stop.received))
        logger.exception("failed")
        return FAILED
    finally:
        stop.uninstall()
        log.close()


def _say_stopped(stopped: "Stopped") -> int:
    logger.warning("stopped by %s", stopped)
    return 128 + stopped.number
