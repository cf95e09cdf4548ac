"""Linear warm-up and decay, by steps or by a time budget."""

import pytest

from pretrain.schedules import LinearSchedule, linear_share


@pytest.mark.parametrize(
    ("position", "share"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (0.91, 0.1), (1.0, 0.0), (1.5, 0.0)],
)
def test_share_rises_over_the_warmup_and_falls_to_zero(position: float, share: float) -> None:
    assert linear_share(position, warmup=0.1) == pytest.approx(share)


def test_no_warmup_starts_at_the_peak() -> None:
    assert linear_share(0.0, warmup=0.0) == 1.0
    assert linear_share(0.25, warmup=0.0) == 0.75


def test_rates_by_step_are_positive_and_symmetric() -> None:
    """By hand: 9 steps, half of the run warm-up: 0.2, 0.4, … 1, … 0.2 of the peak."""
    schedule = LinearSchedule(peak=5e-4, warmup=0.5, steps=9)
    rates = [schedule.learning_rate(step, seconds=1e9) for step in range(9)]
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates == pytest.approx([5e-4 * share for share in expected])


def test_papers_schedule_peaks_at_6_percent() -> None:
    schedule = LinearSchedule(peak=5e-4, warmup=0.06, steps=100_000)
    rates = [schedule.learning_rate(step, 0.0) for step in range(100_000)]
    assert rates.index(max(rates)) == pytest.approx(6000, abs=1)
    assert max(rates) == pytest.approx(5e-4, rel=1e-3)
    assert all(rate > 0 for rate in rates)


def test_time_budget_counts_seconds_not_steps() -> None:
    schedule = LinearSchedule(peak=1.0, warmup=0.1, hours=2.0)
    assert schedule.learning_rate(10**9, seconds=360) == pytest.approx(0.5)
    assert schedule.learning_rate(0, seconds=720) == pytest.approx(1.0)
    assert schedule.learning_rate(0, seconds=3960) == pytest.approx(0.5)
    assert schedule.learning_rate(0, seconds=7200) == 0.0
    assert schedule.learning_rate(0, seconds=9000) == 0.0


def test_share_of_the_run_goes_from_the_first_update_to_the_last() -> None:
    """What an objective's weights follow: by steps alone, however long these take."""
    schedule = LinearSchedule(peak=1.0, warmup=0.1, steps=5)
    assert [schedule.done(step, seconds=1e9) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert LinearSchedule(peak=1.0, warmup=0.1, steps=1).done(0, 0.0) == 0
    by_time = LinearSchedule(peak=1.0, warmup=0.1, hours=1.0)
    assert [by_time.done(7, seconds) for seconds in (0, 900, 7200)] == [0, 0.25, 1]
