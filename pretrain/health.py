"""Trouble that a run can live with but a person should hear of: spikes, slow data, no progress."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import NamedTuple

SIGMA_OF_MAD = 1.4826  # of a normal distribution, for its median absolute deviation


class Spike(NamedTuple):
    """A loss far above those before it."""

    loss: float
    usual: float

    @property
    def factor(self) -> float:
        """How many times the usual loss it is."""
        return self.loss / self.usual

    def __str__(self) -> str:
        return (
            f"the loss jumped to {self.loss:.4g}, {self.factor:.1f} times the {self.usual:.4g} of "
            "the lines before; if it stays there, a lower --lr or gradient_clipping may help"
        )


class SpikeDetector:
    """Compares each logged loss with the median and spread of the last `window` ones.

    A spike is above the median by `sigmas` standard deviations (estimated from the median absolute
    deviation, which single outliers do not move) and by a fifth. The deviation alone would report
    a quiet loss that moves a little, the fifth alone a noisy one. A loss that stays high is
    reported once. While a loss falls, its median lags behind, so that small jumps pass.
    """

    def __init__(self, window: int = 50, least: int = 10, sigmas: float = 6.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._least, self._sigmas = least, sigmas
        self._high = False

    def check(self, loss: float) -> Spike | None:
        """Take the next logged loss; a finding if it is a spike, the first of those in a row.

        One that is not finite is no spike and is passed over: other parts of a run see to that.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < self._least:
            return None
        usual = median(before)
        spread = SIGMA_OF_MAD * median(abs(value - usual) for value in before)
        was_high = self._high
        self._high = loss > usual + max(self._sigmas * spread, 0.2 * abs(usual))
        return Spike(loss, usual) if self._high and not was_high else None


class LoaderWatch:
    """Tells when the trainer waits for data: while one wait lasts, and when many add up.

    Args:
        tell: called with a line; from another thread while a wait lasts.
        workers: of the loader, for the remedy.
        limit: seconds of one wait.
        least: seconds of training that a share is taken of; the first batches are always late.
    """

    def __init__(
        self, tell: Callable[[str], None], workers: int, limit: float = 30.0, least: float = 10.0
    ) -> None:
        self._tell, self._workers = tell, workers
        self._limit, self._least = limit, least
        self._since: float | None = None
        self._waited = self._trained = 0.0
        self._slow = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loader", daemon=True)

    def __enter__(self) -> "LoaderWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which the trainer waits for a batch."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        told: float | None = None  # the beginning of the wait that was told last
        while not self._stopped.wait(min(1.0, self._limit / 4)):
            since = self._since
            if since is None or since == told or time.monotonic() - since < self._limit:
                continue
            told = since
            self._tell(
                f"the trainer has been waiting {self._limit:.0f} s for a batch, and waits on: is "
                f"the disk of --data reachable? {self._remedy()}"
            )

    def check(self, waited: float, seconds: float) -> float | None:
        """Take what the meter counted as waiting for data in the `seconds` since the last call.

        Returns the share of the time, once it is more than half, and again only after it was not.
        """
        self._waited += waited
        self._trained += seconds
        if self._trained < self._least:
            return None
        share, was_slow = self._waited / self._trained, self._slow
        self._waited = self._trained = 0.0
        self._slow = share > 0.5
        if not self._slow or was_slow:
            return None
        self._tell(f"{share:.0%} of the time the trainer waits for data; {self._remedy()}")
        return share

    def _remedy(self) -> str:
        return f"--loader_workers is {self._workers}; more of them load more at once"


@dataclass(frozen=True)
class EarlyStop:
    """Gives up a run that has not learned enough by a certain time (Izsak et al. 2021).

    Their code looks at minutes (`early_stop_time`) and a bound (`early_stop_eval_loss`), at each
    validation from that time on; here the time is a share of the run.

    Attributes:
        after: share of the run from which on it is looked. loss: what a validation must reach.
    """

    after: float
    loss: float

    def applies(self, share: float, validation_loss: float) -> bool:
        """Whether to stop, after a validation with so much of the run done; so too if it is NaN."""
        return share >= self.after and not validation_loss <= self.loss

    def reason(self, share: float, validation_loss: float) -> str:
        """For people."""
        return (
            f"stopped early: after {share:.0%} of the run the validation loss is "
            f"{validation_loss:.4g}, above --early_stop_loss {self.loss:g}"
        )
