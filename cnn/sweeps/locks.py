"""A file lock that a process shares with the processes that it starts."""

import fcntl
import os
from pathlib import Path
from typing import Self

from cnn.errors import Refused


class SharedLock:
    """An exclusive lock on a file, which a process can share with child processes.

    A process holds the lock while the process has the file descriptor open. The lock ends when the
    last of these processes has closed the descriptor or has died, even by `kill -9`. If a parent
    process is killed, the file stays locked while a child process holds the lock. The file is never
    removed, since another process can be about to lock the file.

    Args:
        descriptor: the number of the open file descriptor of a locked file; -1 for none. To lock a
            file by its path, call the method `acquire`.

    Attributes:
        descriptor: the number of the file descriptor; -1 after a call of `release`.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> Self | None:
        """Locks a file if no other process has locked the file.

        The method never waits for another process.

        Args:
            path: the path of the file. A missing file is created.

        Returns:
            The lock; None if the file is locked already.

        Raises:
            Refused: the file cannot be opened for writing, or its file system does not support
                locks.
        """
        lock = cls(-1)
        try:
            lock.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.release()
            if isinstance(error, BlockingIOError):
                return None
            raise Refused(f"{path}: expected a file to lock, got: {error.strerror}") from None
        return lock

    def release(self) -> None:
        """Closes the file descriptor in this process.

        The file stays locked while a child process has the descriptor open. A second call does
        nothing.
        """
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
