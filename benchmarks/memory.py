"""How much memory does a training step need on top of what it must keep anyway?

    python benchmarks/memory.py --minilmv2 PATH --distilbert PATH \
        --json benchmarks/results/memory-cpu.json

The cases, rivals and steps are those of `step`, at 32 rows of 128 tokens. Reported is the highest
number of bytes that live tensors hold during one step, above weights, gradients and optimiser
state, which are all there before it: what is left is activations, logits and losses. On a CPU what
PyTorch's own allocator gives is counted (`torch.profiler`), but neither the scratch memory of
oneDNN and MKL nor NumPy's random words of dropout (256 KiB at most); on a GPU the allocator says
it. The models of a case come one after the other. Ours in bfloat16 stands there with gradient
checkpointing, too, which no rival gets.

About 5 minutes on one core that does 100 GFLOP/s in float32.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bare_step import random_batch
from cases import (
    Case,
    Rival,
    Step,
    add_arguments,
    check_peers,
    chosen_cases,
    rival_of,
    variants,
)
from common import machine, write_report
from torch.profiler import ProfilerActivity, profile

from potstill.console import program, progress
from pretrain.batches import Batch

SETTINGS = ("batch", "length", "dropout")
MORE = {"ours bf16, checkpointing": {"checkpointing": True}}


def peak_bytes(act: Callable[[], object], device: torch.device) -> int:
    """The most bytes of PyTorch's allocator that a call holds at a time, above those before it."""
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        act()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


def needed(step: Step, small: Batch, batch: Batch, device: torch.device) -> int:
    """Bytes that a step on `batch` needs above weights, gradients and optimiser state."""
    step.step(small)  # makes the optimiser's state
    step.loss(small).backward()  # and gradients, to which the step's own are added
    return peak_bytes(partial(step.step, batch), device)


def measure(
    case: Case, rival: Rival, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """All steps of a case, each alone."""
    vocab, length = case.pair.vocab, options.length
    small, batch = (random_batch(vocab, n, length).to(device) for n in (1, options.batch))
    builders = variants(case, rival, options, device, MORE)
    found = {
        name: needed(build(), small, batch, device)
        for name, build in progress(builders.items(), desc=case.name, unit="step")
    }
    return {
        "case": case.name,
        "rival": rival.name,
        "bytes": found,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: MiB of each step, and ours over the rival's."""
    lines = [
        "| objective, teacher-student | rival | rival fp32, MiB | rival autocast | ours fp32 "
        "| ours bf16 | ours bf16, checkpointing | ours over the rival: fp32 / fp32 "
        "| bf16 / autocast | bf16 / fp32 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        plain, autocast, fp32, bf16, _ = row["bytes"].values()
        sizes = " | ".join(f"{n / 2**20:,.0f}" for n in row["bytes"].values())
        shares = f"{fp32 / plain:.2f} | {bf16 / autocast:.2f} | {bf16 / plain:.2f}"
        lines.append(f"| {row['case']} | {row['rival']} | {sizes} | {shares} |")
    return "\n".join(lines) + "\n"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=32, help="Rows of a step.")
    options = parser.parse_args()
    check_peers(options)
    cases = chosen_cases(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure(case, rival_of(case, options), options, device) for case in cases]
    settings = {name: getattr(options, name) for name in SETTINGS}
    report = {"machine": machine(device), "settings": settings, "rows": rows}
    print(table(report))
    if options.json:
        write_report(options.json, report, table(report))


if __name__ == "__main__":
    main()
