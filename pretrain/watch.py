"""A thread in each rank that notices when the launcher or another rank is gone, and acts.

A rank that waits in a collective for one that was killed, or hangs, would wait for minutes or for
ever. The watch names the lost rank and ends the process; the launcher then ends the others.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from potstill.errors import TrainingError
from potstill.signals import Signalled, Stopped, exit_status
from pretrain.heartbeats import Heartbeats
from pretrain.launcher import Launcher
from pretrain.signals import Signals

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Patience:
    """Seconds.

    Attributes:
        silence: a rank without a sign of life for so long is lost.
        notice: what the main thread has to notice a loss by itself, in a failed collective.
        signal: what it has to notice a signal; DeepSpeed's launcher kills after 30 s.
        leave: what it has to end the process after it noticed a loss.
        write: what a checkpoint that is being written still has when a rank is lost.
        last_write: the same when the launcher is about to kill.
    """

    silence: float = 30.0
    notice: float = 5.0
    signal: float = 25.0
    leave: float = 30.0
    write: float = 20.0
    last_write: float = 3.0


class Watch:
    """The watch of this rank, while the `with` block lasts; all ranks enter it together.

    Args:
        signals: of this process; a launcher that is gone acts as SIGTERM does.
        kept: says what is safe on disk, for example "the last whole checkpoint is step-00000500".
        before_exit: called before the process is ended, to let a write in the background finish
            within so many seconds.
    """

    def __init__(
        self,
        signals: Signals,
        launcher: Launcher,
        kept: Callable[[], str],
        before_exit: Callable[[float], None],
        patience: Patience | None = None,
    ) -> None:
        self._signals, self._launcher, self._kept = signals, launcher, kept
        self._before_exit, self._patience = before_exit, patience or Patience()
        self._heartbeats = Heartbeats(self._patience.silence)
        self._stopped, self._explained = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._heartbeats.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        elif isinstance(error, Signalled):
            self.stop("was stopped by a signal", exit_status(error.number))
        elif isinstance(error, Stopped):
            self.stop("was stopped by a signal", error.exit_status)
        else:
            reason = " ".join(str(error).split())[:500]
            self.stop(f"ended with an error of its own: {reason or type(error).__name__}")

    def stop(self, failure: str | None = None, status: int = TrainingError.exit_status) -> None:
        """End the watch and tell the other ranks that this one leaves: well, or why not.

        To be called before the process group is destroyed; a second call does nothing.
        """
        if not self._stopped.is_set():
            self._stopped.set()
            self._heartbeats.stop(failure, status)

    def explain(self) -> TrainingError | None:
        """Why a collective failed: names the rank that is lost; None if none is.

        Waits until that is known: at once where all ranks are on one host, else as long as a rank
        may be silent.
        """
        if not self._heartbeats.has_others():
            return None
        longest = 10.0 if self._heartbeats.all_here() else self._patience.silence + 10.0
        end = time.monotonic() + longest
        while self._heartbeats.lost is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 5)
        if self._heartbeats.lost is None:
            return None
        self._explained.set()
        message = self._message()
        if self._heartbeats.speaks and os.environ["RANK"] != "0":  # rank 0 ends with this error
            _tell(message)
        error = TrainingError(message)
        error.exit_status = self._heartbeats.lost.status
        return error

    def _message(self) -> str:
        assert self._heartbeats.lost is not None
        what = self._heartbeats.lost.what
        return f"{what}; {self._kept()}; run the same command again to go on"

    def _watch(self) -> None:
        told = False
        while self._heartbeats.lost is None and not self._stopped.wait(POLL_SECONDS):
            if not told and self._launcher.is_gone():
                told = True
                if self._heartbeats.is_lowest():
                    _tell("the launcher is gone: the run stops as after SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
            if self._signals.is_overdue(self._patience.signal):
                self._end_deaf()
            self._heartbeats.tick(POLL_SECONDS)
        # A main thread that is through needs no end, unless it is through for want of another rank.
        if self._heartbeats.lost and (self._explained.is_set() or not self._stopped.is_set()):
            self._end_bereft()

    def _end_deaf(self) -> None:
        """The main thread did not ask for signals: it waits for something that does not come."""
        number = self._signals.requested
        assert number is not None
        _tell(
            f"rank {os.environ['RANK']} stopped by {signal.Signals(number).name} within a step, "
            f"which did not end in time; {self._kept()}; run the same command again to go on"
        )
        self._exit(exit_status(number), self._patience.last_write)

    def _end_bereft(self) -> None:
        """End the process for a lost rank, unless the main thread does or needs it no more."""
        if self._explained.wait(self._patience.notice):
            time.sleep(self._patience.leave)  # on its way out it may still wait for the lost one
        elif self._stopped.is_set():
            return  # it came through without the other
        elif self._heartbeats.speaks:
            _tell(self._message())
        lost = self._heartbeats.lost
        self._exit(lost.status if lost else TrainingError.exit_status, self._patience.write)

    def _exit(self, status: int, seconds: float) -> None:
        self._before_exit(seconds)
        os._exit(status)


def _tell(message: str) -> None:
    with suppress(OSError):  # whoever read it may be gone too
        sys.stderr.write(f"error: {message}\n")  # one write: other ranks write there too
        sys.stderr.flush()
