"""Decisions that all ranks must take alike, though only one of them may know the reason."""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from torch import distributed as dist

from potstill.console import is_main_rank
from potstill.errors import PotstillError
from pretrain.meter import Phase, untimed

Result = TypeVar("Result")


def from_main_rank(decide: Callable[[], Result]) -> Result:
    """What `decide` gives on rank 0, on every rank: it alone writes, and it alone looks.

    Files may look different from each host.

    Raises:
        PotstillError, OSError: rank 0's, on every rank.
    """
    found: list[tuple[Result | None, Exception | None] | None] = [None]
    if is_main_rank():
        try:
            found = [(decide(), None)]
        except (PotstillError, OSError) as error:
            found = [(None, error)]
    dist.broadcast_object_list(found, src=0)
    assert found[0] is not None
    result, fault = found[0]
    if fault is not None:
        raise fault
    return result  # type: ignore[return-value]


class Agreement:
    """Numbers that hosts tell each other, without waiting for a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @cached_property
    def _hosts(self) -> dist.ProcessGroup | None:
        """On GPUs a group beside their own, so that no host waits for a GPU."""
        return dist.new_group(backend="gloo") if self._device.type == "cuda" else None

    def largest(self, *values: float, phase: Phase = untimed) -> list[float]:
        """The largest of all ranks' values, one by one; all ranks call it."""
        if dist.get_world_size() == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        with phase("communication"):
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._hosts)
        return told.tolist()
