"""How fast is a training step, against the naive one and against the public code of the papers?

    python benchmarks/step.py --minilmv2 PATH --distilbert PATH \\
        --json benchmarks/results/step-cpu.json --chart docs/images/step-cpu.svg

Each step is forward, backward and AdamW on 8 rows of 128 random tokens without padding (or real
ones, `--data SHARDS`), dropout 0.1. Ours is `bare_step.BareStep` in float32 and bfloat16; the
rival's is the public code (`peers`; TextBrewer where it can be imported) or, where that is not
there, `naive.NaiveStep`, in float32 and under bfloat16 autocast. Both learn the same, which is
checked first (`cases.agree`). All steps of a case take turns in one process, each turn beginning
with another one, so that noise and caches hit all alike; ratios are taken turn by turn. On a CPU
with one thread (the default) the clock is the process's own CPU time.

The share of the peak is the work that the objective needs, by `pretrain.flops`, over the time and
the best rate of plain matrix products here, large ones and those of the models' own shapes: what a
rival computes beyond that work does not count for it.

About 8 minutes on one core that does 100 GFLOP/s in float32.
"""

import argparse
import gc
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare_step import DTYPES, BareStep, random_batch, shard_batch
from cases import (
    Case,
    Rival,
    Step,
    add_arguments,
    agree,
    check_peers,
    chosen_cases,
    rival_of,
    variants,
)
from common import CLOCKS, clock_name, machine, quartiles, seconds, write_report
from step_report import draw, table

from potstill.console import program, progress, say
from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.environment import lacks_bf16
from pretrain.peak import product_speed

SETTINGS = ("batch", "length", "dropout", "turns")
GEMM_SECONDS = 0.2  # of each shape
WARM_UP = 2  # steps: optimiser state; compiled code may be made anew once it is there


def gemm_rates(
    cases: list[Case], tokens: int, large: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """FLOP/s of matrix products by precision and shape "m x k x n": large, and the models' own."""
    widths = sorted(
        {width for case in cases for _, width in (case.pair.teacher, case.pair.student)}
    )
    shapes = [(large, large, large)]
    shapes += [(tokens, k * w, n * w) for w in widths for k, n in ((1, 1), (1, 4), (4, 1))]
    clock = CLOCKS[clock_name(device)]
    return {
        name: {
            " x ".join(map(str, shape)): product_speed(shape, device, dtype, GEMM_SECONDS, clock)
            for shape in shapes
        }
        for name, dtype in DTYPES.items()
    }


def measure(
    case: Case,
    rival: Rival,
    options: argparse.Namespace,
    peaks: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """All steps of a case in turns."""
    difference = agree(case, rival, options.length, device)
    say(f"{case.name}: {rival.name}'s gradient is within {difference:.0e} of ours")
    more = {"ours bf16 compiled": {"compile": True}} if options.compile else {}
    builders = variants(case, rival, options, device, more)
    steps: dict[str, Step] = {name: build() for name, build in builders.items()}
    batch = make_batch(case, options).to(device)
    for step in steps.values():
        for _ in range(WARM_UP):
            step.step(batch)
    turns = []
    for turn in progress(range(options.turns), desc=case.name, unit="turn"):
        turns.append(take_turn(steps, turn, batch, device))
    work = next(s for s in steps.values() if isinstance(s, BareStep)).flops_per_token
    return {
        "case": case.name,
        "rival": rival.name,
        "gradient_difference": difference,
        "flops_per_token": work,
        "steps": {
            name: figures(name, turns, work, batch.counts["tokens"], peaks) for name in steps
        },
    }


def take_turn(
    steps: dict[str, Step], turn: int, batch: Batch, device: torch.device
) -> dict[str, float]:
    """Seconds of a step of each, in an order that goes on by one from turn to turn."""
    names, clock = list(steps), clock_name(device)
    first = turn % len(names)
    order = names[first:] + names[:first]
    return {name: seconds(partial(steps[name].step, batch), device, clock) for name in order}


def make_batch(case: Case, options: argparse.Namespace) -> Batch:
    """Rows without padding, from shards or random."""
    if options.data:
        return shard_batch(options.data, options.batch, options.length, case.pair.vocab)
    return random_batch(case.pair.vocab, options.batch, options.length)


def figures(
    name: str, turns: list[dict[str, float]], work: float, tokens: int, peaks: dict[str, float]
) -> dict[str, Any]:
    """What is reported of one step: milliseconds, speed, share of the peak, ratios to ours."""
    middle = statistics.median(turn[name] for turn in turns)
    peak = peaks["fp32" if name.endswith("fp32") else "bf16"]
    ours = [other for other in turns[0] if other.startswith("ours") and other != name]
    return {
        "ms": quartiles((turn[name] for turn in turns), 1e3),
        "tokens_per_second": tokens / middle,
        "share_of_peak": work * tokens / middle / peak,
        "times": {other: quartiles(turn[name] / turn[other] for turn in turns) for other in ours},
    }


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=8, help="Rows of a step.")
    parser.add_argument("--turns", type=int, default=5, help="Timed steps of each kind.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--compile", action="store_true", help="Ours in bf16 compiled, too.")
    parser.add_argument("--data", type=Path, help="Take rows from these shards.")
    parser.add_argument("--chart", type=Path, help="Draw the figures there, as SVG.")
    options = parser.parse_args()
    if options.turns < 2:
        raise InputError(f"--turns {options.turns} has no spread; give at least 2")
    check_peers(options)
    cases = chosen_cases(options)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and lacks_bf16():
        say("note: this CPU has no bfloat16 instructions; they are emulated, and slow")
    rates = gemm_rates(cases, options.batch * options.length, 128 if options.tiny else 2048, device)
    peaks = {name: max(shapes.values()) for name, shapes in rates.items()}
    rows = []
    for case in cases:
        rows.append(measure(case, rival_of(case, options), options, peaks, device))
        gc.collect()  # the steps' models are in cycles
    settings = {name: getattr(options, name) for name in SETTINGS}
    report = {"machine": machine(device), "settings": settings, "gemm": rates, "rows": rows}
    print(table(report))
    if options.json:
        write_report(options.json, report, table(report))
    if options.chart:
        draw(report, options.chart)


if __name__ == "__main__":
    main()
