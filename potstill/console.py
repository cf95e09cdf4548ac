"""What a program prints: one voice per run (rank 0), progress bars, errors in one line."""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from potstill.errors import PotstillError

OTHERS_WAIT_SECONDS = 5.0


def is_main_rank() -> bool:
    """True in a program without the launcher, and in rank 0 of one with it."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Print a line for people, once per run, without breaking a progress bar."""
    if is_main_rank():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def progress(items: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """A tqdm bar on rank 0's stderr; redrawn rarely where nobody watches (a log file)."""
    if not sys.stderr.isatty():
        settings.setdefault("mininterval", 10.0)
    return tqdm(items, disable=not is_main_rank(), dynamic_ncols=True, **settings)


def program(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a program's `main`: a `PotstillError` becomes one line on stderr and its exit status.

    Every rank of a launched run fails alike, so only rank 0 prints; the others wait a little,
    because the launcher ends all ranks as soon as one is gone.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except PotstillError as error:
            if is_main_rank():
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                time.sleep(OTHERS_WAIT_SECONDS)
            sys.exit(error.exit_status)

    return wrapped
