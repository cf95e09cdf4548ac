"""Plain and memory-lean forms of the losses: what each takes, in time and in memory.

    python benchmarks/lean_forms.py

Forward and backward of `att-mse` and of an attention KL on 4,096 tokens in rows of 128, 512 and
2,048 (12 heads of 64), and of `kd` with the MLM heads of two 384-wide models over 30,522 words, at
512, 2,048 and 8,192 positions; float32 and bfloat16 features. Both forms are timed in turns in one
process (medians, and the median ratio of a turn), `att-mse` also as one would write it first
(direct: both models' scores, their difference, its square); the peak of memory above the inputs is
measured in a process of its own for each form. Writes `results/lean-forms-DEVICE.{json,md}`.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, seconds, write_report
from torch import Tensor, nn
from torch.nn import functional

from potstill.console import program
from pretrain.batches import Batch
from pretrain.features import Feature, Features, Predictions
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.objectives.prediction import count_chunks

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS, HEADS, SIZE, WIDTH, VOCAB = 4096, 12, 64, 384, 30522
CASES = [(name, n) for name in ("att-mse", "att-kl") for n in (128, 512, 2048)]
CASES += [("kd", n) for n in (512, 2048, 8192)]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = ("plain", "lean")


def full_batch(rows: int, length: int) -> Batch:
    """Rows without padding or masked positions."""
    ids, none = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    counts = {"sequences": rows, "tokens": ids.numel(), "masked": 0, "pairs": rows * length**2}
    return Batch(ids, ids == 0, none, none, True, counts, none)


def relation_step(
    name: str, form: str, length: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """Forward and backward of an attention objective on full rows."""
    rows = TOKENS // length
    if form == "direct":
        return direct_step(rows, length, dtype, device)
    batch = full_batch(rows, length).to(device)
    objective = build_objective(name, Settings((LayerPair(1, 1),), form=form))  # type: ignore[arg-type]
    student, teacher = (
        {
            Feature(kind, 1): torch.randn(rows, HEADS, length, SIZE, dtype=dtype, device=device)
            for kind in ("query", "key")
        }
        for _ in range(2)
    )
    for feature in student.values():
        feature.requires_grad_()
    return partial(backward, objective, student, teacher, batch, list(student.values()))


def direct_step(rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Att-MSE as one would write it first: both models' scores, their difference, its square."""
    shape = (rows, HEADS, length, SIZE)
    query, key, other_query, other_key = (
        torch.randn(shape, dtype=dtype, device=device) for _ in range(4)
    )
    student = [query.requires_grad_(), key.requires_grad_()]

    def step() -> None:
        ours, theirs = (
            left.float() @ right.float().transpose(-2, -1) / SIZE**0.5
            for left, right in (student, (other_query, other_key))
        )
        torch.autograd.grad(functional.mse_loss(ours, theirs), student)

    return step


def kd_step(form: str, positions: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Forward and backward of `kd` and of both heads, from the last hidden states."""
    chunked = form == "lean"
    chunks = count_chunks("lean", positions * VOCAB) if chunked else 0
    objective = build_objective("kd", Settings((), logit_chunks=chunks))
    places = torch.arange(positions)  # all of them masked, none an unused slot
    batch = replace(full_batch(1, 1), masked=places, labels=places).to(device)
    head, other = (nn.Linear(WIDTH, VOCAB).to(device, dtype) for _ in range(2))
    hidden, target = (torch.randn(positions, WIDTH, dtype=dtype, device=device) for _ in range(2))
    hidden.requires_grad_()

    def step() -> None:
        if chunked:
            key = Feature("predictions", "masked")
            own: Features = {key: Predictions(hidden, head, VOCAB)}
            theirs: Features = {key: Predictions(target, other, VOCAB)}
        else:
            key = Feature("logits", "masked")
            with torch.no_grad():
                theirs = {key: other(target)}
            own = {key: head(hidden)}
        backward(objective, own, theirs, batch, [hidden, *head.parameters()])

    return step


def backward(
    objective: Any, student: Features, teacher: Features, batch: Any, inputs: list[Tensor]
) -> None:
    """The loss and its gradients, thrown away."""
    total = objective.totals(student, teacher, batch, {}).sum()
    torch.autograd.grad(total, inputs)


def build(
    name: str, size: int, form: str, precision: str, device: torch.device
) -> Callable[[], None]:
    """The step of a case."""
    torch.manual_seed(0)
    dtype = PRECISIONS[precision]
    if name == "kd":
        return kd_step(form, size, dtype, device)  # type: ignore[no-any-return]
    return relation_step(name, form, size, dtype, device)  # type: ignore[no-any-return]


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Memory that one step needs above what its inputs hold; the first step of its process."""
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated() - held)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    held = resident()
    step()
    return max(0, resource_peak() - held)


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def resource_peak() -> int:
    """The highest resident bytes since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def memory(name: str, size: int, form: str, precision: str) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, "--peak_of", name, str(size), form, precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure(
    name: str, size: int, precision: str, turns: int, device: torch.device
) -> dict[str, Any]:
    """A row of the table."""
    forms = (*FORMS, *(["direct"] if name == "att-mse" else []))
    steps = {form: build(name, size, form, precision, device) for form in forms}
    for step in steps.values():  # warm-up
        step()
    taken = [{form: seconds(step, device) for form, step in steps.items()} for _ in range(turns)]
    medians = {form: 1e3 * statistics.median(turn[form] for turn in taken) for form in forms}
    del steps
    peaks = {form: memory(name, size, form, precision) for form in FORMS}
    return {
        "objective": name,
        "size": size,
        "precision": precision,
        "ms": medians,
        "over_lean": {
            form: statistics.median(turn[form] / turn["lean"] for turn in taken)
            for form in forms
            if form != "lean"
        },
        "plain_mib": peaks["plain"] / 2**20,
        "lean_mib": peaks["lean"] / 2**20,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| objective | L, or positions | features | plain, ms | lean, ms | plain / lean "
        "| direct / lean | plain, MiB | lean, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{r['objective']}` | {r['size']:,} | {r['precision']} | {r['ms']['plain']:.0f} "
        f"| {r['ms']['lean']:.0f} | {r['over_lean']['plain']:.2f} | {_direct(r)} "
        f"| {r['plain_mib']:,.0f} | {r['lean_mib']:,.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _direct(row: dict[str, Any]) -> str:
    ratio = row["over_lean"].get("direct")
    return "" if ratio is None else f"{ratio:.2f}"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each form")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    parser.add_argument("--peak_of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.peak_of:
        name, size, form, precision = options.peak_of
        print(peak_bytes(build(name, int(size), form, precision, device), device))
        return
    rows = [
        measure(name, size, precision, options.turns, device)
        for name, size in CASES
        for precision in PRECISIONS
    ]
    report = {"machine": machine(device), "turns": options.turns, "rows": rows}
    write_report(options.results / f"lean-forms-{device.type}.json", report, table(rows) + "\n")
    print(json.dumps(report) if options.json else table(rows))


if __name__ == "__main__":
    main()
