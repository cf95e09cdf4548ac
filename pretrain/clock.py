"""The run's own time: seconds of training, without validation, export and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.meter import Meter


class Clock:
    """Counts on from the seconds that a resumed run had already spent; the meter rests with it."""

    def __init__(self, seconds: float, device: torch.device, meter: Meter) -> None:
        self._start = time.perf_counter() - seconds
        self._device, self._meter = device, meter
        self._is_paused = False

    def seconds(self) -> float:
        """Seconds of training so far, on this rank."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count; one inside another counts, or not, with it."""
        if self._is_paused:
            yield
            return
        self._is_paused = True
        self._settle()
        began = time.perf_counter()
        try:
            with self._meter.paused():
                yield
                self._settle()
        finally:
            self._is_paused = False
            self._start += time.perf_counter() - began

    def _settle(self) -> None:
        """Wait for what a GPU still has in its queue: it belongs to the time before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
