"""The tables of `benchmarks/gpu.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_rungs import RUNGS

COLUMNS = (
    "| objective | rung | what | rows | ms a step (quartiles) | tokens/s | MFU | memory, GiB |"
)


def tables(figures: Mapping[str, Any]) -> str:
    """All figures as Markdown: where, ceiling, ladder, micro-batches, kernels."""
    where, peak = figures["machine"], figures["peak"]
    lines = [
        f"{where['name']}, torch {where['torch']}, transformers {where['transformers']}, commit "
        f"{where['commit'][:12]}, {where['date']}. Peak in bf16: "
        f"{peak['flops_per_second'] / 1e12:,.2f} TFLOP/s ({peak['source']}).",
        "",
        "| matrix product in bf16 | shape | TFLOP/s | of the peak |",
        "|---|---|---:|---:|",
    ]
    for row in figures["products"]:
        speed, shape = row["flops_per_second"], " x ".join(f"{n:,}" for n in row["shape"])
        share = speed / peak["flops_per_second"]
        lines.append(f"| {row['product']} | {shape} | {speed / 1e12:,.2f} | {share:.0%} |")
    for part in ("rungs", "sweep"):
        lines += ["", *_steps(figures[part])]
    lines += ["", "| rung | kernel | ms | share | calls |", "|---|---|---:|---:|---:|"]
    for row in figures["kernels"]:
        if "reason" in row:
            lines.append(f"| {row['rung']} | {_cell(row['reason'])} | | | |")
            continue
        start = f"| {row['rung']} | `{_cell(row['kernel'])}` "
        lines.append(f"{start}| {row['ms']:.2f} | {row['share']:.0%} | {row['calls']} |")
    return "\n".join(lines) + "\n"


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of steps, case by case and rung by rung; what did not run says why."""
    lines = [COLUMNS, "|---|---|---|---:|---:|---:|---:|---:|"]
    cases = list(dict.fromkeys((row["pair"], row["objective"]) for row in rows))
    rungs = list(RUNGS)

    def place(row: Mapping[str, Any]) -> tuple[int, int, int]:
        case = cases.index((row["pair"], row["objective"]))
        return case, rungs.index(row["rung"]), row["rows"]

    for row in sorted(rows, key=place):
        start = (
            f"| {row['objective']} {row['pair']} | {row['rung']} | {row['what']} | {row['rows']} "
        )
        if "reason" in row:
            lines.append(f"{start}| {_cell(row['reason'])} | | | |")
            continue
        spread = f"{1e3 * row['seconds']:,.1f} ({1e3 * row['low']:,.1f}–{1e3 * row['high']:,.1f})"
        memory = f"{row['memory_bytes'] / 2**30:.1f}" if row["memory_bytes"] else "not counted"
        lines.append(
            f"{start}| {spread} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {memory} |"
        )
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
