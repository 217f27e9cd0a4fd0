"""Logging to the console and logs/train.log."""

import contextlib
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from cnn.utils.screen import LINES, printable

FILE_FORMAT = "%(asctime)s %(levelname)s %(message)s"
# Whose messages are shown; libraries' below WARNING are not.
NAMES = ("cnn", "train", "py.warnings")


class _Console(logging.Handler):
    """Writes past a tqdm bar, to stderr; plain lines, with the level where it is no INFO.

    Args:
        speaker: who says it, where it is not the first process of a run: "rank 1: ".
    """

    def __init__(self, speaker: str = ""):
        super().__init__()
        self._speaker = speaker

    def emit(self, record: logging.LogRecord) -> None:
        message = self._speaker + record.getMessage()
        if record.levelno > logging.INFO:
            message = f"{record.levelname.lower()}: {message}"
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        with contextlib.suppress(OSError, ValueError):  # a terminal gone, a full disk behind 2>
            tqdm.write(printable(message, kept=LINES), file=sys.stderr)


class _Printable(logging.Formatter):
    """What would steer the terminal that shows the file, in a name say, is written as its code."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), kept=LINES)


class _File(logging.FileHandler):
    """Appends to train.log; where that fails, says so once until it succeeds again."""

    def __init__(self, path: Path, speaker: str = ""):
        # Of another process than the first the file begins, if at all, with what it has to say.
        late = bool(speaker)
        super().__init__(path, mode="a", encoding="utf-8", delay=late, errors="backslashreplace")
        self.setFormatter(_Printable(FILE_FORMAT.replace("%(message)s", f"{speaker}%(message)s")))
        self._told = False

    def flush(self) -> None:
        super().flush()
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            _tell_unwritable(Path(self.baseFilename), sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _tell_unwritable(path: Path, error: BaseException | None) -> None:
    """To the console alone: the log may be the file that cannot be written."""
    reason = getattr(error, "strerror", None) or error
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(f"warning: {path}: cannot be written: {reason}; training goes on", sys.stderr)


class Log:
    """The log of one process: console at once; what it said is in the file from `open_file` on.

    Of several processes the first one talks; the others tell what goes wrong, and who they are.
    """

    def __init__(self, rank: int = 0) -> None:
        self._speaker = f"rank {rank}: " if rank else ""
        self.root = logging.getLogger()
        self._before = (self.root.level, list(self.root.handlers))
        self._kept = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        tqdm.get_lock()  # made before there are signals that could leave it half made
        self.root.handlers = [_Console(self._speaker), self._kept]
        self.root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
        for name in NAMES:  # what is said while all build the same, they need not say each
            logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)
        logging.captureWarnings(True)

    def open_file(self, path: Path) -> None:
        """Appends to the file, beginning with what was said so far."""
        self.close_file()
        if self._speaker:
            for name in NAMES:
                logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._file = _File(path, self._speaker)
        except OSError as error:
            _tell_unwritable(path, error)
            return
        self._kept.setTarget(self._file)
        self._kept.flush()
        self.root.removeHandler(self._kept)
        self.root.addHandler(self._file)

    def close_file(self) -> None:
        """Writes no more to the file; a next one begins with what is said from here on."""
        if self._file is not None:
            self.root.removeHandler(self._file)
            self._file.close()
            self._file = None
            self.root.addHandler(self._kept)

    def close(self) -> None:
        logging.captureWarnings(False)
        self.close_file()
        level, self.root.handlers = self._before
        self.root.setLevel(level)
