"""Lines of time that are cut at borders, each piece under a label: of a CPU, of a GPU's queue."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from typing import Any

import torch

Label = Hashable
"""What a piece of time belongs to."""

UNREAD = 256
"""Borders in a GPU's queue from which the passed ones are read, wherever the run is."""


class HostTimeline:
    """Of a CPU, which has done its work when a call returns."""

    def __init__(self) -> None:
        self.seconds: dict[Label, float] = defaultdict(float)
        self._label: Label = None
        self._since = time.perf_counter()

    def enter(self, label: Label) -> None:
        """From now on time belongs to a label."""
        now = time.perf_counter()
        self.seconds[self._label] += now - self._since
        self._label, self._since = label, now

    def read(self) -> None:
        """Nothing: borders are read as they are made."""

    def applies(self) -> bool:
        """Whether what is started now delays what is measured."""
        return True


class DeviceTimeline:
    """Of a GPU's compute stream: time between events that the stream passes.

    Args:
        event: makes a timing event. stream: on which it is recorded; current: today's stream.
    """

    def __init__(self, event: Callable[[], Any], stream: Any, current: Callable[[], Any]) -> None:
        self.seconds: dict[Label, float] = defaultdict(float)
        self._event, self._stream, self._current = event, stream, current
        self._borders: deque[tuple[Label, Any]] = deque()
        self._free: list[Any] = []

    def enter(self, label: Label) -> None:
        """From now on time belongs to a label; never waits for the stream."""
        event = self._free.pop() if self._free else self._event()
        event.record(self._stream)
        self._borders.append((label, event))
        if len(self._borders) >= UNREAD:
            self.read()

    def read(self) -> None:
        """Add up what lies between borders that the stream has passed."""
        while len(self._borders) > 1 and self._borders[1][1].query():
            label, begin = self._borders.popleft()
            self.seconds[label] += begin.elapsed_time(self._borders[0][1]) / 1000
            self._free.append(begin)

    def applies(self) -> bool:
        """Not on a stream beside: what runs there delays the compute stream where that waits."""
        return bool(self._current() == self._stream)


def timeline_of(device: torch.device) -> HostTimeline | DeviceTimeline:
    """The timeline of a device."""
    if device.type != "cuda":
        return HostTimeline()
    return DeviceTimeline(
        lambda: torch.cuda.Event(enable_timing=True),
        torch.cuda.current_stream(device),
        lambda: torch.cuda.current_stream(device),
    )
