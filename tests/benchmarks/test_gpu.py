"""`benchmarks/gpu.py`: the ladder runs, on a CPU with tiny models, as it will on a GPU."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from bare_step import BareStep, Learning, Pair, random_batch
from gpu_report import tables
from gpu_rungs import RUNGS, Setting, with_optimizer
from gpu_take import isolated, needed_flops

from potstill.errors import InputError

CPU = torch.device("cpu")
SETTING = Setting(Learning(gpu.TINY), 2, 16, CPU)


def climb(folder: Path, *flags: str) -> tuple[str, dict[str, Any]]:
    """What the program prints and writes, in a Python that has no DeepSpeed."""
    (folder / "deepspeed.py").write_text("raise ImportError('no DeepSpeed on this machine')\n")
    command = [sys.executable, str(Path(gpu.__file__)), "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--json", str(folder / "gpu.json"), *flags],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "gpu.json").read_text())


def test_the_ladder_runs_without_deepspeed_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    printed, figures = climb(tmp_path, "--skip", "compile")
    first = [row for row in figures["rungs"] if row["objective"] == "att-mse"]
    assert [row["rung"] for row in first] == list(RUNGS)
    ran = [row["rung"] for row in first if "seconds" in row]
    assert ran == ["naive-fp32", "naive-bf16", "sdpa", "lean-fp32", "lean-bf16", "fused"]
    reasons = {row["rung"]: row["reason"] for row in first if "reason" in row}
    assert reasons.pop("compile") == "left out (--skip)"
    assert all("needs a GPU" in reason for reason in reasons.values())
    others = {row["objective"] for row in figures["rungs"] if "seconds" in row}
    assert others == {"att-mse", "minilm", "vanilla-kd"}
    assert [row["rows"] for row in figures["sweep"]] == [1, 2, 4]
    assert len(figures["products"]) == 4 and figures["kernels"]
    assert (tmp_path / "gpu.md").read_text().strip() in printed
    assert str(tmp_path) not in json.dumps(figures)


def test_no_rung_starts_when_the_budget_is_spent() -> None:
    options = Namespace(small=True, skip=[], json=None, budget_seconds=-1.0, rung_seconds=1.0)
    ladder = gpu.Ladder(options, CPU)
    ladder.rung("rungs", SETTING.learning, "fused")
    assert ladder.figures["rungs"][0]["reason"] == "no time left (--budget_seconds)"


def test_a_rung_that_fails_hangs_or_dies_leaves_a_reason() -> None:
    assert isolated(60, divide, 0) == {"reason": "ZeroDivisionError: division by zero"}
    assert isolated(60, divide, 4) == {"half": 2.0}
    assert isolated(60, os._exit, 3) == {"reason": "its process ended with status 3"}
    assert isolated(0.5, time.sleep, 60) == {"reason": "took longer than 0 s"}


def divide(number: int) -> dict[str, float]:
    """8 / number."""
    return {"half": 8 / number}


@pytest.mark.parametrize("objective", gpu.OBJECTIVES)
def test_flops_are_those_of_the_bare_step(objective: str) -> None:
    setting = Setting(Learning(Pair((2, 48), (1, 24), 4, 211), objective), 2, 16, CPU)
    bare = BareStep(setting.learning, "fp32", 2, 16)
    assert needed_flops(setting) == pytest.approx(bare.flops_per_token)


def test_another_optimiser_updates_the_same_weights() -> None:
    batch = random_batch(SETTING.learning.pair.vocab, SETTING.rows, SETTING.length)
    losses = []
    for kind in (None, "foreach"):
        bare = SETTING.bare()
        if kind:
            with_optimizer(bare, kind)
        losses.append([float(bare.step(batch)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][0] != losses[0][2]


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="apex: no FusedAdam here"):
        with_optimizer(SETTING.bare(), "apex")


def test_unknown_rungs_and_missing_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, named in (("--skip nothing", "--skip nothing"), ("--device cuda", "no GPU here")):
        if named == "no GPU here" and torch.cuda.is_available():
            continue
        done = subprocess.run(
            [sys.executable, gpu.__file__, *flags.split()], capture_output=True, text=True
        )
        assert done.returncode == 2 and named in done.stderr


def test_a_reason_never_breaks_the_table() -> None:
    row = {"pair": "a", "objective": "b", "rung": "c", "what": "d", "rows": 1, "reason": "x | y"}
    figures = {
        "machine": {"name": "m", "torch": "1", "transformers": "2", "commit": "3", "date": "4"},
        "peak": {"flops_per_second": 1e12, "source": "datasheet"},
        "products": [],
        "rungs": [row],
        "sweep": [],
        "kernels": [{"reason": "none"}],
    }
    (line,) = [line for line in tables(figures).splitlines() if line.startswith("| b a |")]
    assert "x \\| y" in line
