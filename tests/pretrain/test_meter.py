"""The meter: every instant counts once, nested time only inside, and nobody waits for a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm import comm

from pretrain import meter as meter_module
from pretrain import timeline
from pretrain.clock import Clock
from pretrain.meter import COLLECTIVES, Meter, Reading, Slot, memory_peak, timed_collectives
from pretrain.timeline import UNREAD, DeviceTimeline

CPU = torch.device("cpu")


class Time:
    """A clock that only goes when it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def backend(one_rank: None) -> Iterator[Any]:
    """DeepSpeed's backend on the process group that is there."""
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    yield comm.cdb
    comm.cdb = None


def step(meter: Meter, time: Time) -> None:
    """A step of two students: 20 seconds."""
    with meter.phase("data"):
        time.passes(1)
    with meter.phase("teacher"):
        time.passes(2)
    for name, seconds in (("a", 3), ("b", 5)):
        with meter.phase("student", name):
            time.passes(seconds)
            with meter.phase("communication"):
                time.passes(1)
            time.passes(1)
        with meter.phase("optimiser", name):
            time.passes(2)
    time.passes(1)


def test_every_instant_counts_once_where_it_belongs(backend: Any, time: Time) -> None:
    meter = Meter(CPU, ["a", "b"])
    with meter.running():
        step(meter, time)
        reading = meter.reading()
    found = {slot: value for slot, value in reading.seconds.items() if value}
    assert found == {
        Slot("data", ""): 1,
        Slot("teacher", ""): 2,
        Slot("student", "a"): 4,
        Slot("communication", "a"): 1,
        Slot("optimiser", "a"): 2,
        Slot("student", "b"): 6,
        Slot("communication", "b"): 1,
        Slot("optimiser", "b"): 2,
        Slot("other", ""): 1,
    }


def test_shares_are_those_of_a_student_and_add_up_to_one(backend: Any, time: Time) -> None:
    meter = Meter(CPU, ["a", "b"])
    with meter.running():
        step(meter, time)
        first = meter.reading()
        step(meter, time)
        second = meter.reading()
    shares = second.since(first).shares("a")
    assert shares == first.shares("a")
    assert shares == pytest.approx(
        {
            "data": 0.05,
            "teacher": 0.1,
            "student": 0.2,
            "optimiser": 0.1,
            "communication": 0.05,
            "other": 0.05,
            "other_students": 0.45,
        }
    )
    assert shares is not None and sum(shares.values()) == pytest.approx(1)


def test_a_lone_student_has_no_others() -> None:
    reading = Reading({Slot("student", ""): 3.0, Slot("data", ""): 1.0}, 0)
    shares = reading.shares("")
    assert shares is not None and "other_students" not in shares
    assert (shares["student"], shares["data"], shares["teacher"]) == (0.75, 0.25, 0)


def test_no_time_has_no_shares() -> None:
    assert Reading({Slot("data", ""): 0.0}, 0).shares("") is None


def test_pauses_and_what_lies_around_the_run_do_not_count(backend: Any, time: Time) -> None:
    meter = Meter(CPU, [""])
    clock = Clock(0.0, CPU, meter)
    with meter.phase("teacher"):
        time.passes(8)
    with meter.running():
        with meter.phase("student"):
            time.passes(2)
        with clock.paused(), meter.phase("data"):
            time.passes(16)
    time.passes(32)
    assert sum(meter.reading().seconds.values()) == 2
    assert clock.seconds() == 8 + 2 + 32


# --- what DeepSpeed sends


def test_what_deepspeed_sends_is_communication(
    backend: Any, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a name that it took before, and also the wait for what is under way."""

    class Work:
        def wait(self) -> str:
            time.passes(4)
            return "done"

        def is_completed(self) -> bool:
            return True

    def all_reduce(_: Any, __: Any, op: Any, group: Any, async_op: bool) -> Work | None:
        time.passes(1)
        return Work() if async_op else None

    monkeypatch.setattr(type(backend), "all_reduce", all_reduce)
    taken_before, meter = comm.all_reduce, Meter(CPU, [""])
    with meter.running(), meter.phase("student"):
        time.passes(2)
        assert taken_before(torch.zeros(1)) is None
        work = taken_before(torch.zeros(1), async_op=True)
        time.passes(8)
        assert work.is_completed() and work.wait() == "done"
    seconds = meter.reading().seconds
    assert seconds[Slot("communication", "")] == 1 + 1 + 4
    assert seconds[Slot("student", "")] == 2 + 8


def test_collectives_do_what_they_did_and_are_left_as_they_were(backend: Any) -> None:
    seen: list[str] = []

    def phase(name: str) -> Any:
        seen.append(name)
        return meter_module.untimed("other")

    value = torch.full((3,), 2.0)
    with timed_collectives(phase):
        comm.all_reduce(value)
        comm.barrier()
    assert value.tolist() == [2.0] * 3 and len(seen) >= 2 and set(seen) == {"communication"}
    assert not set(COLLECTIVES) & vars(backend).keys()
    for name in COLLECTIVES:
        assert callable(getattr(backend, name))


# --- a GPU's queue


class Queue:
    """A stream: events pass it when it is told to go on; time runs with them."""

    def __init__(self) -> None:
        self.waiting: list[Event] = []
        self.made = 0

    def event(self) -> "Event":
        self.made += 1
        return Event()

    def goes_on(self, milliseconds: float) -> None:
        """All events so far pass, so long one after another."""
        for number, event in enumerate(self.waiting):
            event.passed = Queue.clock = Queue.clock + milliseconds * (number > 0)
        self.waiting.clear()

    clock = 0.0


class Event:
    passed: float | None = None

    def record(self, stream: Queue) -> None:
        self.passed = None
        stream.waiting.append(self)

    def query(self) -> bool:
        return self.passed is not None

    def elapsed_time(self, end: "Event") -> float:
        assert self.passed is not None and end.passed is not None, "an event that has not passed"
        return end.passed - self.passed


@pytest.fixture
def queue() -> Queue:
    return Queue()


def line_on(queue: Queue, current: Callable[[], Any] | None = None) -> DeviceTimeline:
    return DeviceTimeline(queue.event, queue, current or (lambda: queue))


def test_borders_in_a_queue_are_read_once_they_have_passed(queue: Queue) -> None:
    line = line_on(queue)
    for label in ("data", "teacher", "data", None):
        line.enter(label)
    line.read()
    assert not line.seconds, "nothing has passed"
    queue.goes_on(500)
    line.read()
    assert line.seconds == {"data": 1.0, "teacher": 0.5}


def test_a_long_stretch_between_readings_keeps_few_events(queue: Queue) -> None:
    line = line_on(queue)
    for number in range(10 * UNREAD):
        line.enter(number % 2)
        queue.goes_on(1)
    assert queue.made <= UNREAD + 1
    line.read()
    assert sum(line.seconds.values()) == pytest.approx(0.0), "each stood alone in the queue"


def test_what_runs_on_a_stream_beside_is_not_counted(
    queue: Queue, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It delays the stream that is measured only where that waits for it."""
    streams = [queue]
    line = line_on(queue, lambda: streams[-1])
    monkeypatch.setattr(meter_module, "timeline_of", lambda _: line)
    meter = Meter(CPU, [""])
    with meter.running():
        streams.append(Queue())
        with meter.phase("communication"):
            pass
        streams.pop()
        with meter.phase("communication"):
            pass
    assert len(queue.waiting) == 4, "into the run, into the collective and out of it, out of both"


def test_a_cpu_has_the_hosts_timeline_and_this_process_memory() -> None:
    assert isinstance(timeline.timeline_of(CPU), timeline.HostTimeline)
    before = memory_peak(CPU)
    block = torch.ones(2**24)  # 64 MiB
    assert memory_peak(CPU) >= max(before, block.nbytes)
