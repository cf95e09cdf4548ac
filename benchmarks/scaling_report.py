"""Cases of `benchmarks/scaling.py` and their figures: ratios of a turn, the exchange, tables."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common import ROOT
from scale_model import Cluster, Link, Work, fit_line, traffic_seconds

MICRO = 16  # rows of a micro-batch unless the case says otherwise; as ds_configs/cpu_bf16.json
Seconds = Mapping[str, list[list[float]]]
"""By case: for each turn, the seconds of each timed step."""


@dataclass(frozen=True)
class Case:
    """One setting of the trainer, or of the bare step (`stage` None).

    Attributes:
        micro: rows of a micro-batch. zero: more of the ds_config's `zero_optimization`.
        always: whether it runs in every turn, or in the first only.
        single: whether a step is one micro-batch; the points of the scale formula.
    """

    pair: str
    ranks: int
    stage: int | None
    precision: str = "bf16"
    micro: int = MICRO
    zero: tuple[tuple[str, Any], ...] = ()
    always: bool = False
    single: bool = False

    @property
    def name(self) -> str:
        """A folder's name, and the key of its figures."""
        kind = "bare" if self.stage is None else f"zero{self.stage}"
        more = "".join(f"-{key}={value}" for key, value in self.zero)
        alone = "-single" if self.single else ""
        return f"{self.pair}-{self.precision}-{kind}-{self.ranks}x{self.micro}{more}{alone}"

    def accumulation(self, rows: int) -> int:
        """Micro-batches of a step, if those of other cases have so many rows."""
        return 1 if self.single else rows // (self.ranks * self.micro)

    def rows(self, rows: int) -> int:
        """Rows of a step, likewise."""
        return self.ranks * self.micro * self.accumulation(rows)


def ds_config(case: Case, rows: int) -> dict[str, Any]:
    """The shipped config of the case's stage and precision, with its batch sizes."""
    name = "cpu" if case.precision == "fp32" else f"zero{case.stage}_bf16"
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = case.micro
    config["gradient_accumulation_steps"] = case.accumulation(rows)
    config["zero_optimization"].update(case.zero)
    return dict(config)


def ratio(over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median over the turns of the ratio of their median seconds, lowest and highest.

    Both must come from turns of the same numbers; the shorter one ends them.
    """
    found = [statistics.median(a) / statistics.median(b) for a, b in zip(over, under, strict=False)]
    return {"ratio": statistics.median(found), "low": min(found), "high": max(found)}


def median(seconds: Sequence[Sequence[float]]) -> float:
    """The median of all steps of all turns."""
    return statistics.median(second for turn in seconds for second in turn)


def speed_rows(cases: Sequence[Case], seconds: Seconds, tokens: int) -> list[dict[str, Any]]:
    """The trainer against the bare step, and 2 ranks against 1, by pair, precision and stage."""
    rows = []
    alone = {(c.pair, c.precision): c for c in cases if c.stage is None}
    ones = (c for c in cases if c.ranks == 1 and c.stage is not None and c.micro == MICRO)
    for one in (c for c in ones if not c.single):
        two = next(c for c in cases if c == replace(one, ranks=2))
        bare = seconds[alone[one.pair, one.precision].name]
        first, second = seconds[one.name], seconds[two.name]
        rows.append(
            {
                "pair": one.pair,
                "precision": one.precision,
                "stage": one.stage,
                "turns": len(first),
                "bare_tokens_per_second": tokens / median(bare),
                "tokens_per_second": tokens / median(first),
                "two_ranks_tokens_per_second": tokens / median(second),
                "trainer_over_bare": ratio(bare, first),
                "two_ranks_over_one": ratio(first, second),
            }
        )
    return rows


def model_inputs(
    cases: Sequence[Case],
    seconds: Seconds,
    facts: Mapping[str, Mapping[str, Any]],
    link: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    """What `benchmarks/forecast.py` needs, of the first pair: one rank's steps, and the link.

    The steps are those of one micro-batch, so that each pays for a whole update of the optimiser.

    An all-reduce of S bytes between two ranks takes 2 (S / 2 / bandwidth + latency).
    """
    pair = cases[0].pair
    ones = [c for c in cases if c.pair == pair and c.single]
    fixed, per_byte = fit_line([(int(size), each) for size, each in link])
    points = [(c.micro, median(seconds[c.name])) for c in ones]
    return {
        "pair": pair,
        "ranks": 2,
        "points": sorted(points),
        "link": {"bytes_per_second": 1 / per_byte, "latency_seconds": fixed / 2},
        **facts[cases[0].name],
    }


def exchange_rows(
    cases: Sequence[Case], seconds: Seconds, model: Mapping[str, Any], rows: int
) -> list[dict[str, Any]]:
    """What two ranks wait for, measured and by formula, for each setting of the first pair.

    Measured is what is left of a step on 2 ranks when half a step on 1 rank with micro-batches of
    the same size is taken off: the exchange, whatever the cores take from one another, and under
    stage 0, where each rank updates all parameters, half an update of the optimiser.
    """
    link = Link(**model["link"])
    found = []
    for case in cases:
        one = Case(case.pair, 1, case.stage, case.precision, case.micro)
        same = seconds.get(one.name)
        if case.ranks == 1 or case.pair != model["pair"] or same is None:
            continue
        accumulation, compute = case.accumulation(rows), median(same) / 2
        width = 4 if case.precision == "fp32" else 2
        zero = ds_config(case, rows)["zero_optimization"]
        bucket = zero.get("reduce_bucket_size", Work.bucket)  # DeepSpeed's own default
        work = Work((), model["trained"], 4, width, int(case.stage or 0), bucket)
        traffic, _ = traffic_seconds(2, accumulation, compute, work, Cluster(link, link, 2))
        step = median(seconds[case.name])
        found.append(
            {
                "precision": case.precision,
                "stage": case.stage,
                "micro_batch": case.micro,
                "accumulation": accumulation,
                "zero": dict(case.zero),
                "step_seconds": step,
                "half_step_of_one_rank": compute,
                "left": step - compute,
                "formula": traffic,
            }
        )
    return found


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures as Markdown, by part."""
    speed = [
        "| teacher-student | precision | ZeRO | bare, tokens/s | trainer, 1 rank | trainer / bare "
        "| trainer, 2 ranks | 2 ranks / 1 rank |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures["speed"]:
        speed.append(
            f"| {row['pair']} | {row['precision']} | {row['stage']} "
            f"| {row['bare_tokens_per_second']:,.0f} | {row['tokens_per_second']:,.0f} "
            f"| {_spread(row['trainer_over_bare'])} | {row['two_ranks_tokens_per_second']:,.0f} "
            f"| {_spread(row['two_ranks_over_one'])} |"
        )
    exchange = [
        "| ZeRO | precision | setting | micro-batches x rows | step on 2 ranks, s "
        "| half a step on 1, s | left, s | exchange by formula, s |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in figures["exchange"]:
        setting = ", ".join(f"`{k}` {str(v).lower()}" for k, v in row["zero"].items())
        exchange.append(
            f"| {row['stage']} | {row['precision']} | {setting or 'as shipped'} "
            f"| {row['accumulation']} x {row['micro_batch']} | {row['step_seconds']:.3f} "
            f"| {row['half_step_of_one_rank']:.3f} | {row['left']:.3f} | {row['formula']:.3f} |"
        )
    return {"speed": "\n".join(speed) + "\n", "exchange": "\n".join(exchange) + "\n"}


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f}–{found['high']:.2f})"
