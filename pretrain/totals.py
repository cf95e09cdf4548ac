"""What a run took, beside what the papers' runs took."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch import distributed as dist

from pretrain.checkpoint import Progress
from pretrain.meter import Reading


class PaperRun(NamedTuple):
    """A run that a paper reports.

    Attributes:
        device_hours: on `device`. tokens, flops: of the whole run, None where it does not say.
    """

    paper: str
    what: str
    device: str
    device_hours: float
    tokens: float | None = None
    flops: float | None = None


PAPERS = (
    # HTD, Table 7: 100k steps of 1024 rows of 128 tokens.
    PaperRun("HTD", "6x768 by Att-MSE", "A100", 58, tokens=100_000 * 1024 * 128),
    # ETD, Table 1 and footnote 3: 80 hours on 8 cards.
    PaperRun("ETD", "6x384", "V100", 640, flops=1.55e19),
)


@dataclass(frozen=True)
class Totals:
    """A run's cost, from its first step on; shares and memory of its last start.

    Attributes:
        tokens, flops: of all ranks. device_hours: of all devices together.
        mfu: the share of the devices' peak, None where that is not known.
        memory_peak: bytes, of the worst rank.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    flops: float
    device_hours: float
    mfu: float | None
    shares: Mapping[str, float] | None
    memory_peak: int

    def paper_hours(self) -> dict[str, float]:
        """Device-hours for the papers' tokens (or FLOPs) at this run's rate."""
        own = {"tokens": self.tokens, "flops": self.flops}
        return {
            run.paper: self.device_hours * amount / own[unit]
            for run in PAPERS
            for unit, amount in (("tokens", run.tokens), ("flops", run.flops))
            if amount is not None
        }

    def record(self) -> dict[str, object]:
        """The fields of the `summary` event in metrics.jsonl."""
        return {**asdict(self), "paper_hours": self.paper_hours()}

    def lines(self) -> list[str]:
        """What people are told."""
        speed = self.flops / self.seconds
        of_peak = "" if self.mfu is None else f" ({self.mfu:.1%} of the peak)"
        lines = [
            f"speed      {self.tokens_per_second:,.0f} tokens/s, {_flops(speed)}/s{of_peak}",
            f"cost       {self.flops:.2e} FLOP, {self.device_hours:.3g} device-hours, "
            f"{self.memory_peak / 2**30:.2f} GiB at a rank's peak",
        ]
        if self.shares is not None:
            parts = (f"{name.replace('_', ' ')} {part:.1%}" for name, part in self.shares.items())
            lines.append(f"time       {', '.join(parts)}")
        return lines

    def paper_lines(self) -> list[str]:
        """The papers' runs, and what they would take at this run's rate."""
        hours = self.paper_hours()
        return [
            f"{run.paper:10} {run.what}: {_amount(run)} in {run.device_hours:.0f} {run.device}-"
            f"hours; at this run's rate {hours[run.paper]:,.2f} device-hours"
            for run in PAPERS
        ]


def totals(now: Progress, peak_flops: float | None, reading: Reading, student: str) -> Totals:
    """The totals of a student's run, at least one step long.

    Args:
        now: where it ended. peak_flops: of all devices. reading: of the meter, at the last step.
    """
    return Totals(
        tokens=now.tokens,
        seconds=now.seconds,
        tokens_per_second=now.tokens / now.seconds,
        flops=now.flops,
        device_hours=now.seconds * dist.get_world_size() / 3600,
        mfu=now.flops / now.seconds / peak_flops if peak_flops else None,
        shares=reading.shares(student),
        memory_peak=reading.memory_peak,
    )


def _amount(run: PaperRun) -> str:
    return f"{run.tokens / 1e9:.1f} B tokens" if run.tokens else f"{run.flops:.2e} FLOP"


def _flops(value: float) -> str:
    return f"{value / 1e12:.2f} TFLOP" if value >= 1e12 else f"{value / 1e9:.2f} GFLOP"
