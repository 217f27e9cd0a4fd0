"""A file lock that a process shares with the processes that it starts."""

import fcntl
import os
from pathlib import Path
from typing import Self

from cnn.errors import Refused


class SharedLock:
    """An exclusive lock on a file, which a process can share with its child processes.

    Every process that has the open file descriptor holds the lock. The kernel frees the lock when
    the last of these processes has closed the descriptor or has ended, even by `kill -9`. So the
    file stays locked while a child of a killed process still runs. The file is never removed, since
    another process may be about to lock it.

    Args:
        descriptor: the number of the open file descriptor of a locked file. The method `acquire`
            makes a lock from a path instead.

    Attributes:
        descriptor: the number of the file descriptor; -1 after `release`.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path) -> Self | None:
        """Locks a file, without waiting for another process that has locked it.

        Args:
            path: the path of the file, which is created if it does not exist.

        Returns:
            The lock; None if the file is locked already.

        Raises:
            Refused: the file cannot be written, or its file system does not support locks.
        """
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise Refused(f"{path}: expected a file to lock, got: {error.strerror}") from None
        return cls(descriptor)

    def release(self) -> None:
        """Closes the file descriptor in this process.

        The file stays locked while a child process has the descriptor open. A second call of this
        method does nothing.
        """
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
