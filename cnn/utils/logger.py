"""Logging to the console and logs/train.log."""

import contextlib
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from cnn.utils.files import warn_unwritten
from cnn.utils.screen import LINES, escape_unprintable

# Messages of INFO are shown from these; from other libraries, only warnings and errors.
NAMES = ("cnn", "train", "py.warnings")


class _Formatter(logging.Formatter):
    """Escapes control characters, which would act on the terminal that shows the text."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record), keep=LINES)


class _Console(logging.Handler):
    """Writes to stderr above a tqdm bar, with the level where it is not INFO."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed, or the disk full
            tqdm.write(level + self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """Appends to train.log; warns of a write that fails, once until one succeeds again."""

    def __init__(self, path: Path, prefix: str):
        # Other ranks than 0, which have a prefix, create the file only when they have a message.
        delay = bool(prefix)
        super().__init__(path, mode="a", encoding="utf-8", delay=delay, errors="backslashreplace")
        self.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s"))
        self._has_warned = False

    def flush(self) -> None:
        super().flush()
        self._has_warned = False

    def handleError(self, _: logging.LogRecord) -> None:
        if not self._has_warned:
            self._has_warned = True
            error = sys.exc_info()[1]
            warn_unwritten(Path(self.baseFilename), getattr(error, "strerror", None) or str(error))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Log:
    """The log of one process: console, and file once it is open.

    Rank 0 logs everything. Others log errors, and from `open_file` on warnings, with their rank.
    """

    def __init__(self, rank: int = 0) -> None:
        self._prefix = f"rank {rank}: " if rank else ""
        self.root = logging.getLogger()
        self._before = (self.root.level, list(self.root.handlers))
        self._buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        tqdm.get_lock()  # created now: later, a signal could interrupt that
        console = _Console()
        console.setFormatter(_Formatter(f"{self._prefix}%(message)s"))
        self.root.handlers = [console, self._buffer]
        self.root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
        for name in NAMES:  # until `open_file` all ranks would log the same warnings
            logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)
        logging.captureWarnings(True)

    def open_file(self, path: Path) -> None:
        """Appends to a file, first the messages logged so far."""
        self.close_file()
        if self._prefix:
            for name in NAMES:
                logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._file = _File(path, self._prefix)
        except OSError as error:
            warn_unwritten(path, error.strerror or str(error))
            return
        self._buffer.setTarget(self._file)
        self._buffer.flush()
        self.root.removeHandler(self._buffer)
        self.root.addHandler(self._file)

    def close_file(self) -> None:
        """Closes the file; the next one begins with the messages logged from here on."""
        if self._file is not None:
            self.root.removeHandler(self._file)
            self._file.close()
            self._file = None
            self.root.addHandler(self._buffer)

    def close(self) -> None:
        """Closes the file and restores Python's logging as it was before."""
        logging.captureWarnings(False)
        self.close_file()
        level, self.root.handlers = self._before
        self.root.setLevel(level)
