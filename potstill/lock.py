"""A lock on a folder that no process leaves behind, however it ends."""

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from potstill.errors import InputError

ASK_SECONDS = 0.2  # between two questions whether a lock is free


class Lock:
    """A lock that this process holds until `release`, or until it ends; also a context manager."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def release(self) -> None:
        """Let other processes have it. The file stays: whoever opened it already may lock it."""
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def hold(path: Path, message: str) -> Lock:
    """Lock the file `path`, in a folder that exists, for this process, and write its id there.

    It is a POSIX record lock: the system drops it with the process, even after SIGKILL, processes
    that are forked from this one do not have it, and other hosts see it on a shared file system.
    The price: it is gone too when this process opens `path` otherwise and closes it.

    Args:
        message: what to tell when another process holds it, with the remedy.

    Raises:
        InputError: another process holds it (`message` and which one), or it cannot be locked.
    """
    file = _open(path)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        with file:
            raise InputError(f"{message} ({_holder(file)} holds {path})") from None
    except OSError as error:
        file.close()
        raise InputError(
            f"{path}: its file system has no locks ({error.strerror}), so two runs could write "
            "there at once; give a folder on another one"
        ) from error
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        file.close()
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    return Lock(file)


def hold_soon(path: Path, message: str, seconds: float) -> Lock:
    """As `hold`, but waits so many seconds at most for the process that holds it.

    Raises:
        InputError: as `hold`, when the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return hold(path, message)
        except InputError:
            if time.monotonic() >= end:
                raise
            time.sleep(ASK_SECONDS)


def _open(path: Path) -> IO[str]:
    try:
        return open(path, "a+")  # does not touch what another process wrote
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _holder(file: IO[str]) -> str:
    """Who says in the file that it holds the lock; it may be about to."""
    file.seek(0)
    return file.read(200).strip() or "another process"
