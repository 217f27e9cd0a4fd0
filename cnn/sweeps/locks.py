"""A lock that a process shares with those it starts."""

import fcntl
import os
from pathlib import Path
from typing import Self

from cnn.errors import Refused


class SharedLock:
    """A lock on a file, held by this process and by those that are given its descriptor.

    The kernel frees it when the last of them is gone, however that came: so that a killed process
    whose child lives on leaves no free lock behind. The file may hold a line of text. It is never
    removed, since another process may be about to lock it.
    """

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path, *, create: bool) -> Self | None:
        """The lock, or None where others hold it, or there is no file and none is to be made.

        Raises:
            Refused: the file system has no locks, or does not let us write.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if not create:
                return None
            raise Refused(f"{path}: the folder is gone") from None
        except OSError as error:
            raise Refused(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise Refused(f"{path}: the file system has no locks: {error.strerror}") from None
        return cls(path, descriptor)

    def text(self) -> str:
        return os.pread(self.descriptor, 1000, 0).decode("utf-8", "replace")

    def write(self, text: str) -> None:
        """Puts the text into the file, durably."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)
        os.fsync(self.descriptor)

    def release(self) -> None:
        """Lets go; those that share the lock may hold it still."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
