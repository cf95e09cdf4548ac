"""Where the time of a run goes: a stopwatch that is always in exactly one phase.

Every instant counts once, so that shares add up to 1, and what is nested (the gradient exchange
inside a backward pass) does not count outside as well. On a GPU the borders are events in its
queue, read once they have passed: nobody waits for them, and a wait for data that the GPU did not
feel costs nothing. See docs/training.md, "The meter".
"""

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import distributed as dist

from pretrain.timeline import timeline_of

PhaseName = Literal["data", "teacher", "student", "optimiser", "communication", "other"]
Phase = Callable[[PhaseName], AbstractContextManager[None]]
"""Opens a block whose time belongs to a phase."""

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "broadcast"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor"),
    *("all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier"),
)


class Slot(NamedTuple):
    """What an instant belongs to: a phase, and the student in it, "" for all or a lone one."""

    phase: PhaseName
    student: str


def untimed(phase: PhaseName) -> AbstractContextManager[None]:
    """A `Phase` that measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Reading:
    """Seconds by slot since the start, mean over ranks; bytes at the peak, of the worst rank."""

    seconds: Mapping[Slot, float]
    memory_peak: int

    def since(self, before: "Reading | None") -> "Reading":
        """What came after an earlier reading."""
        old = before.seconds if before else {}
        seconds = {slot: value - old.get(slot, 0.0) for slot, value in self.seconds.items()}
        return Reading(seconds, self.memory_peak)

    def data_seconds(self) -> float:
        """Waiting for batches and moving them, mean over ranks."""
        return sum(value for slot, value in self.seconds.items() if slot.phase == "data")

    def shares(self, student: str) -> dict[str, float] | None:
        """Each phase's share of the time, as one student sees it; None of no time.

        What belongs to all counts whole; that of the other students is "other_students".
        """
        total = sum(self.seconds.values())
        if total <= 0:
            return None
        parts = dict.fromkeys(get_args(PhaseName), 0.0)
        for slot, value in self.seconds.items():
            name = slot.phase if slot.student in ("", student) else "other_students"
            parts[name] = parts.get(name, 0.0) + value / total
        return parts


class Meter:
    """A stopwatch for a run of several students, or of one, whose name is ""."""

    def __init__(self, device: torch.device, students: Sequence[str]) -> None:
        self._device, self._line = device, timeline_of(device)
        names = dict.fromkeys(["", *students])  # the same slots, in the same order, on every rank
        self._slots = [Slot(phase, name) for name in names for phase in get_args(PhaseName)]
        self._now: Slot | None = None

    @contextmanager
    def phase(self, name: PhaseName, student: str | None = None) -> Iterator[None]:
        """A block whose time belongs to a phase; of the surrounding block's student, if not told.

        Nothing is measured outside of `running`, nor on a stream beside the compute stream.
        """
        if self._now is None or not self._line.applies():
            yield
            return
        with self._inside(Slot(name, self._now.student if student is None else student)):
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block whose time counts, and in which DeepSpeed's collectives are communication."""
        with self._inside(Slot("other", "")), timed_collectives(self.phase):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        with self._inside(None):
            yield

    @contextmanager
    def _inside(self, slot: Slot | None) -> Iterator[None]:
        before, self._now = self._now, slot
        self._line.enter(slot)
        try:
            yield
        finally:
            self._now = before
            self._line.enter(before)

    def reading(self) -> Reading:
        """Everything until now over all ranks, which all call it; on a GPU until its last border
        that has passed, so behind a synchronisation all of it."""
        self._line.enter(self._now)
        self._line.read()
        own = [self._line.seconds.get(slot, 0.0) for slot in self._slots]
        seconds = torch.tensor(own, dtype=torch.float64, device=self._device)
        peak = torch.tensor(memory_peak(self._device), dtype=torch.int64, device=self._device)
        dist.all_reduce(seconds)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        mean = (seconds / dist.get_world_size()).tolist()
        return Reading(dict(zip(self._slots, mean, strict=True)), int(peak))


def memory_peak(device: torch.device) -> int:
    """Most bytes this process has held: of tensors on a GPU, resident in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def timed_collectives(phase: Phase) -> Iterator[None]:
    """A block in which whatever DeepSpeed sends counts as communication.

    All its collectives go through one backend object; for the time of the block its methods are
    hidden behind ones that look at the clock. What is sent while something else is computed counts
    where it is waited for.
    """
    from deepspeed.comm import comm  # here: a step is also taken where there is no engine

    backend = comm.cdb
    assert backend is not None, "deepspeed.init_distributed comes first"
    for name in COLLECTIVES:
        setattr(backend, name, _timed(getattr(backend, name), phase))
    try:
        yield
    finally:
        for name in COLLECTIVES:
            delattr(backend, name)


def _timed(collective: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
    @wraps(collective)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with phase("communication"):
            work = collective(*args, **kwargs)
        return _TimedWork(work, phase) if hasattr(work, "wait") else work

    disabled: Callable[..., Any] = torch.compiler.disable(timed)  # a clock is nothing to trace
    return disabled


class _TimedWork:
    """A collective under way, whose wait is communication."""

    def __init__(self, work: Any, phase: Phase) -> None:
        self._work, self._phase = work, phase

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("communication"):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
