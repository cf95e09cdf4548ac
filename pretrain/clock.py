"""The run's own time: seconds of training, without validation, export and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist


class Clock:
    """Counts on from the seconds that a resumed run had already spent."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._start = time.perf_counter() - seconds
        self._device = device

    def seconds(self) -> float:
        """Seconds of training so far, on this rank."""
        return time.perf_counter() - self._start

    def agreed_seconds(self) -> float:
        """Rank 0's seconds, on every rank, so that all take the same decision."""
        value = torch.tensor([self.seconds()], dtype=torch.float64, device=self._device)
        dist.broadcast(value, src=0)
        return float(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        self._settle()
        began = time.perf_counter()
        yield
        self._settle()
        self._start += time.perf_counter() - began

    def _settle(self) -> None:
        """Wait for what a GPU still has in its queue: it belongs to the time before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
