"""What a program prints: one voice per run (rank 0), progress bars, errors in one line."""

import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from tqdm.auto import tqdm

from potstill.errors import PotstillError

OTHERS_WAIT_SECONDS = 5.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def is_main_rank() -> bool:
    """True in a program without the launcher, and in rank 0 of one with it."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line for people, once per run, without breaking a progress bar."""
    if is_main_rank():
        with suppress(OSError):  # whoever read it may be gone: no reason to lose what is done
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()


def progress(items: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """A tqdm bar on rank 0's stderr; redrawn rarely where nobody watches (a log file)."""
    if not sys.stderr.isatty():
        settings.setdefault("mininterval", 10.0)
    return tqdm(items, disable=not is_main_rank(), dynamic_ncols=True, **settings)


def program(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a program's `main`: a `PotstillError` becomes one line on stderr and its exit status.

    So does a disk that is full, or a file that cannot be read. Every rank of a launched run fails
    alike, so only rank 0 prints; the others wait a little, because the launcher ends all ranks as
    soon as one is gone.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except PotstillError as error:
            _end(str(error), error.exit_status)
        except OSError as error:
            if error.errno in NO_ROOM:
                place = f"{error.filename}: " if error.filename else ""
                _end(f"{place}{error.strerror}; make room, and run the same command again", 1)
            if error.filename is None:  # nothing that a person could look at
                raise
            _end(f"{error.filename}: {error.strerror}; make it accessible, or give another", 2)

    return wrapped


def _end(message: str, status: int) -> NoReturn:
    if is_main_rank():
        with suppress(OSError):
            print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    else:
        time.sleep(OTHERS_WAIT_SECONDS)
    sys.exit(status)
