"""The ladder on a GPU: what each thing that makes the step faster is worth there.

    python benchmarks/gpu.py [--json benchmarks/results/gpu.json]

First the ceiling: bf16 matrix products at the model's own shapes. Then, for BERT-base to 6x768
under Att-MSE, one rung after another, from the library's models to compiled ones. Then
micro-batches from 64 rows up on the fastest of our rungs, and the kernels that its time goes to.
Then what stands beside `compile`, and three rungs for each other student and objective. What cannot
run here says why in its row. The file of `--json` is written anew after every rung, and no rung
starts once `--budget_seconds` are over. If it is there already, by the same code, settings and
machine, what ran is kept and only the rest is taken: call it again until no row lacks time. MFU
counts what the objective needs, whatever a rung computes.

It needs neither DeepSpeed nor a network. `--device cpu --small` takes tiny models, to see that it
runs: such figures say nothing.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bare_step import Learning, Pair
from common import ROOT, machine, write_report
from gpu_report import tables
from gpu_rungs import RUNGS, Setting
from gpu_take import Found, isolated, take_gemms, take_profile, take_step

from potstill.console import program, say
from potstill.errors import InputError
from potstill.files import write_json
from pretrain.peak import datasheet_peak

PARTS = ("rungs", "sweep", "kernels")
CODE = ("bare_step.py", "common.py", "naive.py", "gpu_rungs.py", "gpu_take.py")
PAIRS = ("12x768-6x768", "12x768-6x384")
OBJECTIVES = ("att-mse", "minilm", "vanilla-kd")  # minilm is att-kl + val-kl
TINY = Pair((2, 48), (1, 48), heads=4, vocab=211)
OURS = ("fused", "compile", "cuda-graphs")
"""Rungs of which the fastest is swept and profiled."""
BESIDE, LAST = ("own-stream", "fp8-teacher", "apex-adam"), "deepspeed-adam"
"""Rungs beside `compile`; the last one builds with nvcc, for minutes."""
SAME = ("device", "name", "torch", "transformers", "code")
"""What figures of two calls must share, of their machine, to stand in one file."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a rung's micro-batch and of the sweep, tokens of a row, seconds per measurement."""

    rows: int
    sweep: tuple[int, ...]
    length: int
    seconds: float


LARGE = Sizes(256, (64, 128, 256, 512, 1024), 128, 2.0)
SMALL = Sizes(2, (1, 2, 4), 16, 0.05)


class Ladder:
    """Takes measurements and keeps them, in a file too."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.sizes = SMALL if options.small else LARGE
        self._end = time.monotonic() + options.budget_seconds
        where = {k: v for k, v in machine(device).items() if k != "clock"}
        self.figures: dict[str, Any] = {
            "machine": where | {"code": code_hash()},
            "settings": {"small": options.small, "length": self.sizes.length},
            "peak": None,
            "products": [],
            **{part: [] for part in PARTS},
        }
        if options.json and options.json.exists():
            self.figures |= earlier(options.json, self.figures)

    def setting(self, learning: Learning, rows: int | None = None) -> Setting:
        """A case at so many rows, or at those of a rung."""
        return Setting(learning, rows or self.sizes.rows, self.sizes.length, self.device)

    def take(self, act: Callable[..., Found], *arguments: Any) -> Found:
        """A measurement, if there is time left."""
        if time.monotonic() > self._end:
            return {"reason": "no time left (--budget_seconds)"}
        return isolated(self.options.rung_seconds, act, *arguments)

    def keep(self, part: str, rows: Sequence[Found]) -> None:
        """Add figures, show them, and write the file."""
        self.figures[part] += [dict(row) for row in rows]
        for row in rows:
            say(f"{part}: " + ", ".join(f"{name} {_short(value)}" for name, value in row.items()))
        if self.options.json:
            write_json(self.options.json, self.figures)

    def ceiling(self, learning: Learning) -> None:
        """The products of a layer, and what counts as the peak: the datasheet's, if there is one.

        Nothing if an earlier call has measured them.

        Raises:
            InputError: not even they run.
        """
        if self.figures["products"]:
            return
        found = self.take(take_gemms, self.setting(learning), self.sizes.seconds / 10)
        if "reason" in found:
            raise InputError(
                f"--device {self.device}: matrix products fail there: {found['reason']}"
            )
        name = self.figures["machine"]["name"]
        sheet = datasheet_peak(name, torch.bfloat16, False) if self.device.type == "cuda" else None
        source = "datasheet" if sheet else "large square products"
        peak = {"flops_per_second": sheet or found["large_squares"], "source": source}
        self.figures["peak"] = {**peak, "large_squares": found["large_squares"]}
        self.keep("products", found["products"])

    def rung(self, part: str, learning: Learning, name: str, rows: int | None = None) -> None:
        """A rung's figures, or why there are none; nothing if an earlier call has them."""
        setting = self.setting(learning, rows)
        row: dict[str, Any] = {"pair": str(learning.pair), "objective": learning.objective}
        row |= {"rung": name, "what": RUNGS[name].what, "rows": setting.rows}
        if any(row.items() <= there.items() for there in self.figures[part]):
            return
        found: Found = {"reason": "left out (--skip)"}
        if name not in self.options.skip:
            found = self.take(take_step, setting, name, self.sizes.seconds)
        if "seconds" in found:
            peak = self.figures["peak"]["flops_per_second"]
            found = {**found, "mfu": found["needed_flops_per_second"] / peak}
        self.keep(part, [{**row, **found}])

    def profile(self, learning: Learning, name: str) -> None:
        """Where a rung's time goes, or why nobody knows; nothing if an earlier call has it."""
        if any(row["rung"] == name for row in self.figures["kernels"]):
            return
        found = self.take(take_profile, self.setting(learning), name)
        self.keep("kernels", found.get("kernels", [{"rung": name, **found}]))

    def climb(self) -> None:
        """All of it, what matters most first: there may be no time for the rest."""
        pairs = [TINY] if self.options.small else [Pair.parse(text) for text in PAIRS]
        first, *others = [Learning(pair, name) for pair in pairs for name in OBJECTIVES]
        self.ceiling(first)
        for name in (name for name in RUNGS if name not in (*BESIDE, LAST)):
            self.rung("rungs", first, name)
        if best := fastest(self.figures["rungs"]):
            for rows in self.sizes.sweep:
                self.rung("sweep", first, best, rows)
            self.profile(first, best)
        for name in BESIDE:
            self.rung("rungs", first, name)
        for learning in others:
            for name in (name for name, rung in RUNGS.items() if rung.main):
                self.rung("rungs", learning, name)
        self.rung("rungs", first, LAST)


def code_hash() -> str:
    """The SHA-256 of what a figure depends on: a commit says nothing about a changed tree."""
    paths = [*(ROOT / "pretrain").rglob("*.py"), *(ROOT / "benchmarks" / name for name in CODE)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def earlier(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call of the same code, settings and machine has measured; otherwise nothing.

    Rows that say only why they have no figures are left out, so that they are taken again.

    Raises:
        InputError: the file is of another program.
    """
    try:
        found = json.loads(path.read_text())
        same = found["settings"] == fresh["settings"] and all(
            found["machine"][name] == fresh["machine"][name] for name in SAME
        )
        kept = {part: [row for row in found[part] if "reason" not in row] for part in PARTS}
        measured = {name: found[name] for name in ("peak", "products")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--json {path}: not a file of this program ({error!r}); name another"
        ) from error
    if not same:
        say(f"{path}: of other code, settings or another machine; all is measured anew")
        return {}
    say(f"{path}: {sum(map(len, kept.values()))} rows are kept")
    return kept | measured


def fastest(rows: Sequence[Found]) -> str | None:
    """The rung of ours that trains most tokens per second, None if none ran."""
    ran = [row for row in rows if row["rung"] in OURS and "seconds" in row]
    return max(ran, key=lambda row: row["tokens_per_second"])["rung"] if ran else None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu only with --small"
    )
    parser.add_argument("--small", action="store_true", help="tiny models: only to see it run")
    parser.add_argument("--skip", default="", help="rungs to leave out, with commas between")
    parser.add_argument("--budget_seconds", type=float, default=540, help="no rung starts later")
    parser.add_argument("--rung_seconds", type=float, default=240, help="a longer rung is killed")
    parser.add_argument("--json", type=Path, help="figures; their table stands beside as .md")
    options = parser.parse_args()
    options.skip = [name for name in options.skip.split(",") if name]
    if unknown := sorted(set(options.skip) - set(RUNGS)):
        raise InputError(f"--skip {unknown[0]}: no such rung; there are {', '.join(RUNGS)}")
    if options.device == "cpu" and not options.small:
        raise InputError("--device cpu: BERT-base takes hours there; add --small to see it run")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: there is no GPU here; --device cpu --small shows that the ladder runs"
        )
    ladder = Ladder(options, torch.device(options.device))
    ladder.climb()
    text = tables(ladder.figures)
    print(text)
    if options.json:
        write_report(options.json, ladder.figures, text)


if __name__ == "__main__":
    main()
