"""A run that was killed and started again is the run that was never stopped, bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launch import (
    START_LIMIT,
    Materials,
    command,
    environment,
    flags,
    metrics,
    runs,
    write_ds_config,
)
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, SAVE_EVERY = 88, 8
RESUMED_AT = 80  # of the run that is given a path


@pytest.fixture(scope="module")
def folder(materials: Materials) -> Path:
    """Runs of two ranks with dropout: `killed` (and started again), `unbroken`, `from-path`."""
    root = materials.folder / "resume"
    root.mkdir()
    config = write_ds_config(root / "ds.json", 2, 2, zero_optimization={"stage": 1})

    def run(name: str, **given: Any) -> list[str]:
        return flags(
            ds_config=config,
            data=materials.ragged,
            teacher=materials.teacher,
            objective="1:0.5*kd+att-mse+hid-cls-contrast",
            contrast_negatives=50,  # the memory goes round, and not in whole steps
            student_layers=2,
            dropout=0.1,
            max_steps=STEPS,
            validate_every=6,
            save_every=SAVE_EVERY,
            log_every=1,
            lr=2e-3,
            output=root / name,
            **given,
        )

    kill_behind_a_checkpoint(materials, run("killed"), root / "killed")
    leave_half_a_checkpoint(root / "killed")
    path = root / "unbroken" / "checkpoints" / f"step-{RESUMED_AT:08d}"
    several = [run("killed"), run("unbroken"), run("from-path", resume=path), run("killed")]
    (root / "printed").write_text(runs(materials, 2, several, "resume"))
    return root


def kill_behind_a_checkpoint(materials: Materials, arguments: list[str], run: Path) -> None:
    """Start the real program by the real launcher, and kill all of it behind a checkpoint."""
    started = subprocess.Popen(
        [*command(2), *arguments],
        env=environment(materials.folder),
        cwd=materials.folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + START_LIMIT
        while time.monotonic() < limit and not list(run.glob("checkpoints/step-*/checkpoint.json")):
            assert started.poll() is None, "the run ended before it was killed"
            time.sleep(0.01)
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    (run / "steps-when-killed").write_text(str(len(metrics_until_torn(run))))


def metrics_until_torn(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"kind": "train"' in line]


def leave_half_a_checkpoint(run: Path) -> None:
    """What a run that is killed while it saves leaves: files without the mark, and a torn line."""
    whole = min(run.glob("checkpoints/step-*/checkpoint.json")).parent
    half = whole.with_name(f"step-{STEPS - 1:08d}")
    shutil.copytree(whole, half)
    (half / "checkpoint.json").unlink()
    (half / "weights.safetensors").write_bytes(b"torn")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 9')


def numbers(run: Path, kind: str, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in ("step", *names)) for line in metrics(run, kind)]


def test_the_run_was_killed_on_its_way(folder: Path) -> None:
    """Otherwise the tests below would compare nothing."""
    assert SAVE_EVERY <= int((folder / "killed" / "steps-when-killed").read_text()) < STEPS
    resumes = [line for line in metrics(folder / "killed", "event") if line["event"] == "resume"]
    assert len(resumes) == 1 and resumes[0]["step"] % SAVE_EVERY == 0
    assert 0 < resumes[0]["step"] < STEPS - 1, "the half-written checkpoint was not taken"


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_resumed_run_measures_bitwise_what_the_unbroken_one_does(folder: Path, kind: str) -> None:
    names = ("loss", "terms", *(("lr", "grad_norm", "tokens", "flops") if kind == "train" else ()))
    resumed, unbroken = (numbers(folder / run, kind, *names) for run in ("killed", "unbroken"))
    assert resumed == unbroken
    assert len({line[1] for line in unbroken}) == len(unbroken), "losses that do not change"


def test_each_step_stands_in_the_metrics_once(folder: Path) -> None:
    for run in ("killed", "unbroken"):
        assert [step for (step,) in numbers(folder / run, "train")] == [*range(1, STEPS + 1)]
        validated = [step for (step,) in numbers(folder / run, "validation")]
        assert validated == [*range(0, STEPS + 1, 6), STEPS]
        saved = [
            line["step"] for line in metrics(folder / run, "event") if line["event"] == "checkpoint"
        ]
        expected = [*range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]
        if run == "killed":  # maybe between a checkpoint and its line
            expected = [step for step in expected if step in saved]
        assert saved == expected


def test_the_exported_student_is_bitwise_the_unbroken_runs(folder: Path) -> None:
    resumed, unbroken, from_path = (
        load_file(folder / run / "student" / "model.safetensors")
        for run in ("killed", "unbroken", "from-path")
    )
    for name, weight in unbroken.items():
        assert weight.equal(resumed[name]) and weight.equal(from_path[name]), name


def test_a_run_goes_on_from_the_checkpoint_that_it_is_given(folder: Path) -> None:
    names = ("loss", "lr", "grad_norm")
    ours, theirs = (numbers(folder / run, "train", *names) for run in ("from-path", "unbroken"))
    assert ours == theirs[RESUMED_AT:]


def test_a_finished_run_started_again_says_so_and_trains_nothing(folder: Path) -> None:
    assert (folder / "printed").read_text().count("finished already") == 1


def test_only_the_newest_checkpoints_stay(folder: Path) -> None:
    for run in ("killed", "unbroken"):
        whole = sorted((folder / run / "checkpoints").glob("step-*/checkpoint.json"))
        assert [mark.parent.name for mark in whole] == ["step-00000080", "step-00000088"]
        assert json.loads(whole[-1].read_text())["world_size"] == 2
