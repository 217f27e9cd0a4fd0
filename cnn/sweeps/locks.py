"""A file lock that a process shares with the processes that it starts."""

import contextlib
import fcntl
from pathlib import Path
from typing import IO

from cnn.errors import Refused


def acquire(path: Path) -> IO[bytes] | None:
    """Locks a file if no other process has locked the file.

    The function never waits for another process. The lock is exclusive. A process holds the lock
    while the process has the returned file open, and can share the lock with a child process by
    passing on the file descriptor. The lock ends when the last of these processes has closed the
    file or has died, even by `kill -9`. If a parent process is killed, the file stays locked while
    a child process holds the lock. The file is never removed, since another process can be about
    to lock the file.

    Args:
        path: the path of the file. A missing file is created.

    Returns:
        The open file; None if the file is locked already.

    Raises:
        Refused: the file cannot be opened for writing, or its file system does not support locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Refused(f"{path}: expected a file to lock, got: {error.strerror}") from None
        stack.pop_all()  # the locked file stays open
        return file
