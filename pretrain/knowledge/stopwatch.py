"""Seconds a row of work that is done batch by batch."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LEAST = 3
"""Micro-batches that are timed, if there are so many rows."""
SECONDS = 3.0
"""After which work has been timed for long enough."""


@dataclass
class Stopwatch:
    """Seconds a row of what was timed, the device's queue empty before and after each call."""

    device: torch.device
    taken: list[float] = field(default_factory=list)
    spent: float = 0.0

    def __call__(self, rows: int, act: Callable[..., Any], *given: Any) -> Any:
        """What `act` gives, done for so many rows."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        result = act(*given)
        wait()
        self.taken.append((spent := time.perf_counter() - start) / rows)
        self.spent += spent
        return result

    @property
    def enough(self) -> bool:
        """Whether what was timed may end."""
        return len(self.taken) >= LEAST and self.spent > SECONDS

    @property
    def median(self) -> float:
        """Seconds a row of the median call."""
        return statistics.median(self.taken)
