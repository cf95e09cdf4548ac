"""Grids on Ray: equal to single runs, resumed, retried, on two nodes, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from finetune.grid import main
from finetune.results import read_result
from finetune.settings import DataSettings, RunSettings, TrainSettings
from finetune.trial import run_trial
from tests.conftest import REPOSITORY
from tests.finetune.test_grid_plan import rte

ray = pytest.importorskip("ray", reason="the grid's extra, [cluster]")
pytestmark = pytest.mark.slow

SECONDS = 240.0  # for which anything is waited at most
TABLES = ("results.csv", "results.json", "summary.md")
LONG = ("--epochs", "150", "--batch_size", "8")  # seconds, so that there is a middle


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, at this machine's address."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
        },
    )
    yield made
    made.shutdown()


@pytest.fixture
def flags(tmp_path: Path, bert: Path) -> list[str]:
    """A grid of two learning rates and one seed on RTE's kind of rows."""
    data = rte(tmp_path / "data")
    chosen = ["--model", f"tiny={bert}", "--data", str(data), "--tasks", "rte", "--seeds", "1"]
    varied = ["--lr", "1e-3,5e-3", "--batch_size", "16", "--epochs", "2"]
    return [*chosen, *varied, "--max_length", "32", "--precision", "fp32"]


def tables(output: Path) -> dict[str, bytes]:
    """The final tables by name."""
    return {name: (output / name).read_bytes() for name in TABLES}


def trials(output: Path) -> dict[str, dict[str, Any]]:
    """The finished results by the name of their folder."""
    found = {folder.name: read_result(folder) for folder in output.glob("trials/*/*/*/")}
    return {name: result for name, result in found.items() if result is not None}


def start(flags: list[str], output: Path) -> subprocess.Popen[bytes]:
    """The program in a process of its own."""
    command = [sys.executable, "finetune/grid.py", *flags, "--output", str(output)]
    log = open(output.with_suffix(".log"), "ab")
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)


def until(what: Callable[[], Any]) -> Any:
    """What `what` gives once it gives something."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


def running(output: Path) -> list[int]:
    """The processes that have a trial under way, as its lock says."""
    holders = []
    for config in output.glob("trials/*/*/*/config.json"):
        if not (config.parent / "result.json").exists():
            words = (config.parent / ".lock").read_text().split()
            holders += [int(words[1])] if len(words) > 1 else []
    return [holder for holder in holders if psutil.pid_exists(holder)]


def test_trials_equal_single_runs_to_the_last_bit_whatever_ran_before_them(
    cluster: Any, flags: list[str], tmp_path: Path, bert: Path
) -> None:
    output = tmp_path / "grid"
    main([*flags, "--address", cluster.address, "--output", str(output)])
    found = trials(output)
    assert sorted(found) == ["0.001-16-2-0", "0.005-16-2-0"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for lr, name in ((5e-3, "0.005-16-2-0"), (1e-3, "0.001-16-2-0")):  # the other way round
            alone = run_trial(
                RunSettings(str(bert), str(tmp_path / name), save_model=False),
                DataSettings("rte", str(tmp_path / "data"), max_length=32),
                TrainSettings(lr=lr, batch_size=16, epochs=2, precision="fp32"),
            )
            assert found[name]["epochs"] == alone["epochs"]
            log = output / f"trials/rte/tiny/{name}/log.jsonl"
            assert losses(log) == losses(tmp_path / name / "log.jsonl")
    finally:
        torch.set_num_threads(threads)


def losses(log: Path) -> list[float]:
    """Every training loss that a run logged."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_grown_grid_runs_only_what_is_new_and_a_fault_stops_no_other_trial(
    cluster: Any, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, joined = tmp_path / "grid", ["--address", cluster.address]
    main([*flags, *joined, "--output", str(output)])
    first = tables(output)
    stamps = {p: p.stat().st_mtime_ns for p in output.glob("trials/*/*/*/result.json")}
    main([*flags, *joined, "--output", str(output)])
    assert tables(output) == first

    foreign = output / "trials/rte/tiny/0.001-16-2-1"  # where a trial cannot live
    foreign.mkdir()
    (foreign / "config.json").write_text('{"lr": 1}')
    more = [*flags, "--seeds", "2", *joined, "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        main(more)
    assert stop.value.code == 1
    assert json.loads((foreign / "failed.json").read_text())["attempts"] == 1
    assert "another run's folder" in (output / "summary.md").read_text()
    assert "0.005-16-2-1" in trials(output)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps

    (foreign / "config.json").unlink()
    main(more)  # what failed is tried again
    assert len(trials(output)) == 4
    assert not (foreign / "failed.json").exists()
    assert "4 trials, 3 of them finished before" in capsys.readouterr().out


def test_a_killed_worker_is_replaced_and_its_trial_runs_again_in_halves(
    cluster: Any, flags: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "grid"
    grid = start([*flags, *LONG, "--address", cluster.address], output)
    os.kill(until(lambda: running(output))[0], signal.SIGKILL)
    assert grid.wait(SECONDS) == 0
    parts = sorted(result["settings"]["accumulation"] for result in trials(output).values())
    assert parts == [1, 2]
    said = output.with_suffix(".log").read_text()
    assert "its process died" in said
    assert "once more, every batch in 2 parts" in said


def test_a_node_that_dies_costs_its_trials_nothing_but_time(
    cluster: Any, flags: list[str], tmp_path: Path
) -> None:
    second = cluster.add_node(
        num_cpus=1, node_ip_address="127.0.0.2", object_store_memory=80 * 2**20
    )
    cluster.wait_for_nodes()
    output = tmp_path / "grid"
    grid = start([*flags, *LONG, "--address", cluster.address], output)
    until(lambda: len(running(output)) == 2)
    cluster.remove_node(second, allow_graceful=False)
    assert grid.wait(SECONDS) == 0
    assert [result["settings"]["accumulation"] for result in trials(output).values()] == [1, 1]
    assert "once more" in output.with_suffix(".log").read_text()


def test_a_grid_killed_and_stopped_in_the_middle_ends_with_the_tables_of_an_unbroken_one(
    cluster: Any, flags: list[str], tmp_path: Path
) -> None:
    main([*flags, *LONG, "--address", cluster.address, "--output", str(tmp_path / "whole")])
    output = tmp_path / "grid"
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        grid = start([*flags, *LONG, "--workers", "1"], output)
        until(lambda: running(output))
        family = psutil.Process(grid.pid).children(recursive=True)
        assert family
        grid.send_signal(number)
        assert grid.wait(SECONDS) == status
        until(lambda family=family: not any(alive(process) for process in family))
    assert start([*flags, *LONG, "--workers", "1"], output).wait(SECONDS) == 0
    assert tables(output) == tables(tmp_path / "whole")
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted([".lock", "grid.json", "tokenised", "trials", *TABLES])


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
