"""SIGTERM, SIGINT and SIGUSR1: at once before training, remembered while it goes on.

A Python handler runs only between two steps of the interpreter, so not while the main thread waits
in a collective. The number of a signal therefore also goes through a pipe to a thread, which always
notices: see `signal.set_wakeup_fd`.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from potstill.signals import STOPPING, Signalled, exit_status

PATIENCE_SECONDS = 1.0  # `timeout` and others send one interrupt twice, to a process and its group
PARENT_CHECK_SECONDS = 1.0


class Signals:
    """The stopping signals of this process, while the `with` block lasts (in the main thread).

    Outside of `deferred` a signal raises `Signalled`; inside it is only remembered, for whoever
    asks `pending`. A second interrupt, from a person who does not want to wait, ends the process.

    Attributes:
        requested: the first stopping signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._requested_at = 0.0
        self._asked_at: float | None = None
        self._longest_wait = 0.0  # between two questions
        self._noticed = False
        self._deferred = self._raised = False
        self._interrupted_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = {number: signal.signal(number, self._arrived) for number in STOPPING}
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a signal the process is on its way out, and the launcher may send more of them:
        # they must not take its exit status.
        stopped = self.requested is not None
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if stopped else before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writing, b"\0")  # closing it is no end: forked workers have it open too
        self._thread.join()
        os.close(self._writing)
        os.close(self._reading)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which signals are remembered, not raised."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = self.requested is not None  # what is being obeyed is not disturbed

    def request(self, number: int) -> None:
        """Remember a signal as if it had come, unless one has; from any thread."""
        if self.requested is None:
            self._requested_at = time.monotonic()
            self.requested = number

    @property
    def pending(self) -> int | None:
        """What came, for the main thread, which asks between two pieces of work and obeys."""
        now = time.monotonic()
        if self._asked_at is not None:
            self._longest_wait = max(self._longest_wait, now - self._asked_at)
        self._asked_at = now
        self._noticed = self.requested is not None
        return self.requested

    def is_overdue(self, seconds: float) -> bool:
        """Whether a signal came so long ago, and the main thread has not asked since.

        Where its pieces of work are long, it gets twice the time of the longest one.
        """
        if self.requested is None or self._noticed:
            return False
        return time.monotonic() - self._requested_at > max(seconds, 2 * self._longest_wait)

    def _arrived(self, number: int, _: FrameType | None) -> None:
        self.request(number)
        if not self._deferred and not self._raised:
            self._raised = True  # once: what comes while this one is obeyed changes nothing
            raise Signalled(number)

    def _listen(self) -> None:
        while 0 not in (numbers := os.read(self._reading, 64)):
            for number in numbers:  # others too: SIGCHLD, of which torch has a handler
                if number == signal.SIGINT:
                    self._interrupted()
                if number in STOPPING:
                    self.request(number)

    def _interrupted(self) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        elif now - self._interrupted_at > PATIENCE_SECONDS:
            line = "error: interrupted twice: the program ends without a checkpoint"
            print(line, file=sys.stderr, flush=True)
            os._exit(exit_status(signal.SIGINT))


def ignore_in_worker(_: int) -> None:
    """Let a loader worker live through signals that are not its parent's; a `worker_init_fn`.

    The launcher terminates a rank's whole tree, its workers too, though the rank needs them for the
    rest of its step. The rank itself ends workers with SIGTERM when it exits, and a worker whose
    rank is gone ends on its own.
    """
    signal.set_wakeup_fd(-1)  # the parent's, which must not hear what comes to its child
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # for all threads that start from here
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    process = multiprocessing.parent_process()
    assert process is not None
    parent = process.pid
    while os.getppid() == parent:
        came = signal.sigtimedwait(STOPPING, PARENT_CHECK_SECONDS)
        if came is not None and came.si_pid == parent:
            break
    os._exit(1)
