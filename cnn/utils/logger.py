"""Logging to the console and to logs/train.log."""

import contextlib
import logging.handlers
import sys
from pathlib import Path

from tqdm import tqdm

from cnn.utils.files import warn_unwritten
from cnn.utils.screen import LINES, escape_unprintable

# The loggers whose INFO messages are shown. Other libraries show only warnings and errors.
NAMES = ("cnn", "train", "py.warnings")


class _Formatter(logging.Formatter):
    """A formatter that escapes control characters, except line ends and tabs.

    A terminal would obey control characters in a message.
    """

    def format(self, record: logging.LogRecord) -> str:
        return escape_unprintable(super().format(record), keep=LINES)


class _Console(logging.Handler):
    """A handler that writes messages to stderr, above any progress bar.

    A message above the level INFO begins with the level, as in "warning: ".
    """

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed, or the disk full
            tqdm.write(level + self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """A handler that appends messages to train.log.

    If a write fails, the handler logs a warning. The handler logs no further warning until a write
    has succeeded.

    Args:
        path: the path of train.log.
        prefix: a text before every message, such as "rank 1: ", or "". With a prefix, the file is
            created only when there is a message.
    """

    def __init__(self, path: Path, prefix: str):
        # Ranks other than 0 have a prefix. They create the file only when they have a message.
        super().__init__(path, encoding="utf-8", delay=bool(prefix), errors="backslashreplace")
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
    """The log of one process, which writes to the console and, after `open_file`, also to a file.

    From its creation until `close`, the log replaces the handlers of Python's root logger.

    On rank 0, the log writes messages of this project that have at least the level INFO, and
    warnings and errors of other libraries. On other ranks, the log writes errors. After
    `open_file`, the log of another rank also writes warnings of this project. Messages of other
    ranks begin with the rank, as in "rank 1: ".

    Args:
        rank: the index of this process among the processes of the run.
    """

    def __init__(self, rank: int = 0) -> None:
        self._prefix = f"rank {rank}: " if rank else ""
        self.root = logging.getLogger()
        self._before = (self.root.level, list(self.root.handlers))
        self._buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        tqdm.get_lock()  # created now, since a signal could interrupt it later
        console = _Console()
        console.setFormatter(_Formatter(f"{self._prefix}%(message)s"))
        self.root.handlers = [console, self._buffer]
        self.root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
        for name in NAMES:  # until `open_file` all ranks would log the same warnings
            logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)
        logging.captureWarnings(True)

    def open_file(self, path: Path) -> None:
        """Opens a file, to which all further messages are appended.

        Earlier messages that are not in any file yet are appended first. If the file cannot be
        opened, a warning is logged. Messages then appear only on the console.

        Args:
            path: the path of the file, such as logs/train.log.
        """
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
        """Closes the file of the log, if a file is open.

        Later messages are kept in memory until `open_file` opens another file.
        """
        if self._file is not None:
            self.root.removeHandler(self._file)
            self._file.close()
            self._file = None
            self.root.addHandler(self._buffer)

    def close(self) -> None:
        """Closes the log, and restores the root logger's earlier level and handlers."""
        logging.captureWarnings(False)
        self.close_file()
        level, self.root.handlers = self._before
        self.root.setLevel(level)
