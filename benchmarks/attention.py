"""Which attention is fastest here: PyTorch's fused kernel, or one of the two written out?

    python benchmarks/attention.py [--json benchmarks/results/attention-cpu.json]

Times the forms of `pretrain.attention` on the device there is, in turns, and gives medians and, of
every turn, each form's time over that of `plain`: below 1 it wins. Three uses: forward only (a
teacher), forward and backward (a student), the same with dropout 0.1. The choice made in
`pretrain.attention.choose_attention` rests on these ratios.

On a CPU with one thread (OMP_NUM_THREADS=1) the clock is the process's own CPU time, so that other
programs on the machine hardly matter; otherwise it is the wall clock.
"""

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import clock_name, machine, quartiles, seconds

from potstill.console import program
from potstill.files import write_json
from pretrain.attention import (
    Attention,
    plain_attention,
    sdpa_attention,
    trained_attention,
)

USES = {  # backward pass, dropout
    "forward": (False, 0.0),
    "forward+backward": (True, 0.0),
    "forward+backward, dropout 0.1": (True, 0.1),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


FORMS = {"plain": plain_attention, "sdpa": sdpa_attention, "trained": trained_attention}


@dataclass(frozen=True)
class Row:
    """A measured case: medians in milliseconds, and ratios to `plain` with their quartiles."""

    heads: int
    head_size: int
    precision: str
    use: str
    milliseconds: dict[str, float]
    over_plain: dict[str, dict[str, float]]


def once(attention: Attention, tensors: list[torch.Tensor], backward: bool, drop: float) -> float:
    """Seconds of one call, the device's queue empty before and after."""

    def act() -> None:
        with torch.inference_mode(not backward):
            out = attention(tensors[0], tensors[1], tensors[2], None, drop)
        if backward:
            torch.autograd.grad(out, tensors[:3], tensors[3])

    return seconds(act, tensors[0].device, clock_name(tensors[0].device))


def measure(
    shape: tuple[int, int, int, int], precision: str, use: str, turns: int, device: torch.device
) -> Row:
    """Run all forms in turns, so that noise of the machine hits them alike."""
    backward, drop = USES[use]
    options: dict[str, Any] = {"dtype": PRECISIONS[precision], "device": device}
    tensors = [torch.randn(shape, **options).requires_grad_(backward) for _ in range(3)]
    tensors.append(torch.randn(shape, **options))

    def call(attention: Attention) -> float:
        return once(attention, tensors, backward, drop)

    for attention in FORMS.values():  # warm-up
        call(attention)
    taken = [{name: call(form) for name, form in FORMS.items()} for _ in range(turns)]
    return Row(
        heads=shape[1],
        head_size=shape[3],
        precision=precision,
        use=use,
        milliseconds={n: 1e3 * statistics.median(turn[n] for turn in taken) for n in FORMS},
        over_plain={n: quartiles(turn[n] / turn["plain"] for turn in taken) for n in FORMS},
    )


def print_table(rows: list[Row]) -> None:
    """The rows as a Markdown table."""
    print("| heads x size | precision | use | plain, ms | sdpa / plain | trained / plain |")
    print("|---|---|---|---:|---:|---:|")
    for row in rows:
        spreads = [
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
            for name, ratio in row.over_plain.items()
            if name != "plain"
        ]
        print(
            f"| {row.heads} x {row.head_size} | {row.precision} | {row.use} "
            f"| {row.milliseconds['plain']:.2f} | {' | '.join(spreads)} |"
        )


@program
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="Sequences.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a sequence.")
    parser.add_argument("--turns", type=int, default=15, help="Timed runs of each form.")
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = [
        measure((options.batch, 12, options.length, size), precision, use, options.turns, device)
        for size in (64, 32)
        for precision in PRECISIONS
        for use in USES
    ]
    where = machine(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print_table(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: getattr(options, key) for key in ("batch", "length", "turns")}
        write_json(
            options.json,
            {"machine": where, "settings": settings, "rows": [asdict(row) for row in rows]},
        )


if __name__ == "__main__":
    main()
