"""The signals that end a program: what they raise, and the exit status that they come to."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from potstill.errors import PotstillError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what a batch system sends as a notice of termination."""


class Signalled(BaseException):
    """A signal came. No `Exception`: libraries that catch those would swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stopped(PotstillError):
    """The program ends for a signal; `outcome` says what is kept, and the remedy."""

    def __init__(self, number: int, outcome: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {outcome}")
        self.exit_status = exit_status(number)


def exit_status(number: int) -> int:
    """What a program ends with after a signal: 130 for an interrupt, else 143 (terminated)."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


@contextmanager
def raised_signals() -> Iterator[None]:
    """A block, in the main thread, in which a stopping signal raises `Signalled`."""
    before = {number: signal.signal(number, _raise) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _: FrameType | None) -> None:
    raise Signalled(number)
