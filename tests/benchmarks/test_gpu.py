"""`benchmarks/gpu.py`: the ladder runs, on a CPU with tiny models, as it will on a GPU."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partialmethod
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
from bare_step import BareStep, Learning, Pair, random_batch
from gpu_report import tables
from gpu_rungs import RUNGS, Setting, halves, with_optimizer
from gpu_take import is_kernel, isolated, needed_flops, take_step
from torch.autograd import DeviceType

from potstill.errors import InputError

CPU = torch.device("cpu")
SETTING = Setting(Learning(gpu.TINY), 2, 16, CPU)


@pytest.fixture(scope="module", autouse=True)
def no_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All rungs here are forked from one server, since it imports for seconds: a Python that has
    no DeepSpeed, but this module and so all of the program."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "deepspeed.py").write_text("raise ImportError('no DeepSpeed on this machine')\n")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # another module's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, "deepspeed", None)  # another module's, in this process
        yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def imported(name: str) -> dict[str, bool]:
    """Import a module."""
    return {name: bool(import_module(name))}


def test_the_ladder_runs_without_deepspeed_and_says_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "ImportError: no DeepSpeed on this machine"
    assert isolated(60, imported, "deepspeed") == {"reason": reason}
    flags = ["--device", "cpu", "--small", "--skip", "compile"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "gpu.json").read_text())
    first = [row for row in figures["rungs"] if row["objective"] == "att-mse"]
    assert [row["rung"] for row in first] == list(RUNGS)
    assert figures["rungs"][-1]["rung"] == gpu.LAST
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


def ladder_on(path: Path | None, budget: float) -> gpu.Ladder:
    """A ladder of tiny models."""
    options = Namespace(small=True, skip=[], json=path, budget_seconds=budget, rung_seconds=60.0)
    return gpu.Ladder(options, CPU)


def test_no_rung_starts_when_the_budget_is_spent() -> None:
    ladder = ladder_on(None, -1.0)
    ladder.rung("rungs", SETTING.learning, "fused")
    assert ladder.figures["rungs"][0]["reason"] == "no time left (--budget_seconds)"


def take_here(
    taken: list[str], limit: float, act: Any, setting: Setting, *more: Any
) -> Mapping[str, Any]:
    """What `isolated` would give, without a process; the third rung has trouble."""
    taken.append(f"{setting.learning.objective} {setting.rows} {more[0]}")
    if act is gpu.take_gemms:
        return {"products": [{"product": "p", "flops_per_second": 1.0}], "large_squares": 1.0}
    if act is gpu.take_profile:
        return {"kernels": [{"rung": more[0], "kernel": "k"}]}
    if len(taken) == 3:
        return {"reason": "trouble"}
    return {"seconds": 1.0, "tokens_per_second": 1.0, "needed_flops_per_second": 1.0}


def test_a_second_call_takes_only_what_the_first_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "gpu.json", []
    for _ in range(2):
        calls.append(taken := [])
        monkeypatch.setattr(gpu, "isolated", lambda *given: take_here(taken, *given))  # noqa: B023
        ladder_on(path, 60.0).climb()
    core = ["naive-fp32", "naive-bf16", "sdpa", "lean-fp32", "lean-bf16", *gpu.OURS]
    assert [line.split()[2] for line in calls[0][1:9]] == core
    assert calls[0][9:13] == [f"att-mse {rows} fused" for rows in (1, 2, 4)] + ["att-mse 2 fused"]
    assert len(calls[0]) == 13 + 3 + 2 * 3 + 1, "each beside, two other cases, the last"
    assert calls[1] == [calls[0][2]], "only what had trouble"
    figures = json.loads(path.read_text())
    assert all("seconds" in row for row in figures["rungs"]) and len(figures["kernels"]) == 1
    monkeypatch.setattr(gpu, "code_hash", lambda: "other")
    assert ladder_on(path, -1.0).figures["rungs"] == []
    path.write_text("{}")
    with pytest.raises(InputError, match="not a file of this program"):
        ladder_on(path, 60.0)


def test_a_rung_that_fails_hangs_or_dies_leaves_a_reason() -> None:
    assert isolated(60, divide, 0) == {"reason": "ZeroDivisionError: division by zero"}
    assert isolated(60, divide, 4) == {"half": 2.0}
    assert isolated(60, os._exit, 3) == {"reason": "its process ended with status 3"}


def test_what_a_killed_rung_has_started_ends_with_it_and_its_builds_go(tmp_path: Path) -> None:
    note = tmp_path / "note"
    assert isolated(2, hang, note) == {"reason": "took longer than 2 s"}
    child, extensions = note.read_text().split()
    for _ in range(100):
        if not alive(int(child)):
            break
        time.sleep(0.05)
    assert not alive(int(child)) and not Path(extensions).exists()


def hang(note: Path) -> None:
    """Start a process that lasts, say which, and where extensions are built, and hang."""
    child = subprocess.Popen(["sleep", "600"])
    note.write_text(f"{child.pid} {os.environ['TORCH_EXTENSIONS_DIR']}")
    child.wait()


def alive(process: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_compiled_rung_runs_in_its_process() -> None:
    found = isolated(240, take_compiled, SETTING)
    assert "reason" not in found and found["frames"] >= 2 and found["seconds"] < 1


def take_compiled(setting: Setting) -> dict[str, Any]:
    """The rung with all of the compiler but for its C++, which takes half a minute here."""
    traced = partialmethod(BareStep.compile, backend="aot_eager")
    BareStep.compile = traced  # type: ignore[method-assign,assignment]
    found = take_step(setting, "compile", 0.05)
    return {**found, "frames": torch._dynamo.utils.counters["frames"]["ok"]}


def test_halves_of_a_batch_have_its_loss_together() -> None:
    batch = random_batch(gpu.TINY.vocab, 4, 16)
    bare = BareStep(Learning(gpu.TINY, dropout=0.0), "fp32", 4, 16)
    parts = halves(batch)
    scale = bare.scale(*parts)
    torch.testing.assert_close(scale, bare.scale(batch))
    together = torch.stack([bare.loss(part, scale) for part in parts]).sum()
    torch.testing.assert_close(together, bare.loss(batch))
    assert [part.input_ids.shape for part in parts] == [(2, 16), (2, 16)]


def test_kernels_are_counted_without_what_launches_them() -> None:
    def event(kind: DeviceType, annotation: bool) -> SimpleNamespace:
        return SimpleNamespace(device_type=kind, is_user_annotation=annotation)

    assert is_kernel(event(DeviceType.CUDA, False))
    assert not is_kernel(event(DeviceType.CPU, False))
    assert not is_kernel(event(DeviceType.CUDA, True)), "it covers kernels that are there already"


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


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(InputError, match="apex: no FusedAdam here"):
        with_optimizer(SETTING.bare(), "apex")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--skip nothing", "--skip nothing"),
        ("--device cuda", "no GPU here"),
        ("--device cpu", "--device cpu: BERT-base takes hours there; add --small"),
    ],
)
def test_unknown_rungs_and_missing_gpus_are_refused(
    flags: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_a_reason_never_breaks_the_table() -> None:
    row = {"pair": "a", "objective": "b", "rung": "fused", "what": "d", "rows": 1}
    row |= {"reason": "x | y"}
    figures = {
        "machine": {"name": "m", "torch": "1", "transformers": "2", "commit": "3", "date": "4"},
        "peak": {"flops_per_second": 1e12, "source": "datasheet"},
        "products": [],
        "rungs": [row],
        "sweep": [],
        "kernels": [{"rung": "fused", "reason": "none"}],
    }
    (line,) = [line for line in tables(figures).splitlines() if line.startswith("| b a |")]
    assert "x \\| y" in line
