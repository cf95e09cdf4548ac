"""The learning rate over a run, and where in the run an update is."""

from dataclasses import dataclass


def linear_share(position: float, warmup: float) -> float:
    """Linear rise over the first `warmup` of the run, linear fall to 0 at its end.

    Args:
        position: where the run is, 0 to 1. warmup: share of the run.
    """
    position = min(max(position, 0.0), 1.0)
    if position < warmup:
        return position / warmup
    return (1 - position) / (1 - warmup)


@dataclass(frozen=True)
class LinearSchedule:
    """Warm-up and decay over `steps`, or over a time budget (academic-budget BERT).

    Attributes:
        peak: learning rate at the end of warm-up. warmup: its share of the run.
        steps: the run's steps, for a schedule by step. hours: the budget, for one by time.
    """

    peak: float
    warmup: float
    steps: int | None = None
    hours: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """The share of the run, 0 … 1, at the update after `step` finished steps.

        By step, the first update is at 0 and the last one at 1.
        """
        if self.steps is not None:
            return min(1.0, step / max(1, self.steps - 1))
        assert self.hours is not None
        return min(1.0, seconds / (self.hours * 3600))

    def learning_rate(self, step: int, seconds: float) -> float:
        """The rate for the update after `step` finished steps and `seconds` of training.

        By step, the position is (step + 1) / (steps + 1), so that no update has rate 0.
        """
        if self.steps is not None:
            position = (step + 1) / (self.steps + 1)
        else:
            assert self.hours is not None
            position = seconds / (self.hours * 3600)
        return self.peak * linear_share(position, self.warmup)
