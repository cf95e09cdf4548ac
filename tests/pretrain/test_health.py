"""Spikes, slow loaders and runs without progress are found, and nothing else is."""

import json
import math
import random
import threading
import time
from pathlib import Path

import pytest

from pretrain.health import EarlyStop, LoaderWatch, Spike, SpikeDetector


def spikes(losses: list[float]) -> list[tuple[int, Spike]]:
    detector = SpikeDetector()
    found = ((place, detector.check(loss)) for place, loss in enumerate(losses))
    return [(place, spike) for place, spike in found if spike]


def real_curves(repository: Path) -> list[list[float]]:
    """Logged losses of whole runs, of every fifth step."""
    runs = json.loads((repository / "benchmarks" / "results" / "real-run.json").read_text())["runs"]
    return [[loss for _, loss in run["train"]] for run in runs.values()]


def test_a_spike_is_found_with_its_factor() -> None:
    ((place, spike),) = spikes([1.0, 1.1, 0.9] * 5 + [4.0] + [1.0] * 5)
    assert (place, spike.usual, spike.factor) == (15, 1.0, 4.0)
    assert "jumped to 4, 4.0 times the 1 of" in str(spike)


def test_the_loss_of_real_runs_has_no_spikes(repository: Path) -> None:
    for curve in real_curves(repository):
        assert len(curve) > 100 and spikes(curve) == []


def test_a_doubled_loss_late_in_a_real_run_is_a_spike(repository: Path) -> None:
    for curve in real_curves(repository):
        broken = curve[:90] + [2 * curve[90]] + curve[91:]
        assert [place for place, _ in spikes(broken)] == [90]


def test_noise_alone_is_no_spike() -> None:
    noise = random.Random(0)
    assert spikes([math.exp(noise.gauss(0, 0.1)) for _ in range(3000)]) == []


def test_a_quiet_loss_that_moves_a_little_is_no_spike() -> None:
    assert spikes([1.0] * 20 + [1.15]) == []
    assert len(spikes([1.0] * 20 + [1.25])) == 1


def test_a_loss_that_stays_high_is_reported_once() -> None:
    assert [place for place, _ in spikes([1.0] * 20 + [3.0] * 100)] == [20]


def test_the_first_lines_and_losses_that_are_not_finite_are_no_spikes() -> None:
    assert spikes([1.0] * 9 + [50.0]) == []
    ((place, spike),) = spikes([1.0] * 12 + [math.nan, math.inf, 3.0])
    assert (place, spike.usual) == (14, 1.0)


def test_a_stalled_loader_is_reported_while_it_stalls_and_once() -> None:
    told = threading.Event()
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        told.set()

    with LoaderWatch(tell, workers=2, limit=0.2) as watch, watch.waiting():
        assert told.wait(5)  # while it waits
        time.sleep(0.3)
    (line,) = lines
    assert "waiting 0 s for a batch" in line and "--loader_workers is 2" in line


def test_each_stall_is_reported_and_short_waits_are_not() -> None:
    lines: list[str] = []
    with LoaderWatch(lines.append, workers=0, limit=0.2) as watch:
        for _ in range(30):
            with watch.waiting():
                time.sleep(0.01)
        assert lines == []
        for _ in range(2):
            with watch.waiting():
                time.sleep(0.4)
    assert len(lines) == 2


def test_a_loader_that_takes_half_the_time_is_reported_once_until_it_does_not() -> None:
    lines: list[str] = []
    watch = LoaderWatch(lines.append, workers=1)
    waits = [(6, 10), (6, 10), (1, 10), (9, 10)]
    assert [watch.check(*wait) for wait in waits] == [0.6, None, None, 0.9]
    assert lines[0].startswith("60% of the time the trainer waits for data; --loader_workers is 1")


def test_the_first_batches_are_no_slow_loader() -> None:
    watch = LoaderWatch(pytest.fail, workers=1)
    assert watch.check(3, 4) is None
    assert watch.check(1, 9) is None


def test_a_run_stops_early_only_late_enough_and_with_too_high_a_loss() -> None:
    stop = EarlyStop(after=0.125, loss=6.0)
    assert not stop.applies(0.1, 9.0)
    assert not stop.applies(0.125, 6.0)
    assert stop.applies(0.125, 6.1)
    assert stop.applies(0.5, math.nan)
    assert stop.reason(0.125, 6.125) == (
        "stopped early: after 12% of the run the validation loss is 6.125, "
        "above --early_stop_loss 6"
    )
