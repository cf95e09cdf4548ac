"""Grids on Ray: equal to single runs, resumed, retried, on two nodes, killed, closed to strangers.

What takes long here is the start of a process that imports Ray or a worker's libraries, so grids
run in this process where the process is not the point, and most of them on one cluster.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from tests.launch import START_LIMIT

ray = pytest.importorskip("ray", reason="the grid's extra, [cluster]")
pytestmark = pytest.mark.slow

SECONDS = float(START_LIMIT)  # for which anything is waited at most
SOON = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # an idle process of a killed Ray waits 60
TABLES = ("results.csv", "results.json", "summary.md")
EPOCHS, BATCH = 60, 8  # seconds of a trial, so that there is a middle
STRANGER = "import ray; ray.init(address='{}', log_to_driver=False, configure_logging=False)"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, at this machine's address."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else they wait behind all other tests
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with RTE's kind of rows in data/, and room for the grid `whole`."""
    folder = tmp_path_factory.mktemp("grids")
    rte(folder / "data")
    return folder


@pytest.fixture(scope="module")
def flags(place: Path, bert: Path) -> list[str]:
    """A grid of two learning rates and one seed."""
    data = ["--data", str(place / "data"), "--tasks", "rte", "--max_length", "32"]
    varied = ["--lr", "1e-3,5e-3", "--batch_size", str(BATCH), "--epochs", str(EPOCHS)]
    return ["--model", f"tiny={bert}", *data, *varied, "--seeds", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def whole(cluster: Any, flags: list[str], place: Path) -> Path:
    """The folder of that grid, run without a break on the cluster."""
    main([*flags, "--address", cluster.address, "--output", str(place / "whole")])
    return place / "whole"


def tables(output: Path) -> dict[str, bytes]:
    """The final tables by name."""
    return {name: (output / name).read_bytes() for name in TABLES}


def trials(output: Path) -> dict[str, dict[str, Any]]:
    """The finished results by the name of their folder."""
    found = {folder.name: read_result(folder) for folder in output.glob("trials/*/*/*/")}
    return {name: result for name, result in found.items() if result is not None}


@pytest.fixture
def start() -> Iterator[Callable[[list[str], Path], subprocess.Popen[bytes]]]:
    """Starts the program in a process of its own, at home beside its output."""
    started: list[subprocess.Popen[bytes]] = []

    def run(flags: list[str], output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "finetune/grid.py", *flags, "--output", str(output)]
        own = bare() | SOON | {"HOME": str(output.parent)}
        with open(output.with_suffix(".log"), "ab") as log:
            started.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=log, stderr=log)
            )
        return started[-1]

    yield run
    for process in started:  # a test that failed leaves none
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
        process.kill()
        process.wait()


def bare() -> dict[str, str]:
    """The environment without what Ray is told by it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def until(what: Callable[[], Any]) -> Any:
    """What `what` gives once it gives something."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


def running(output: Path) -> dict[str, int]:
    """The processes that have a trial under way, as its lock says, by the trial's folder."""
    holders = {}
    for config in output.glob("trials/*/*/*/config.json"):
        if not (config.parent / "result.json").exists():
            words = (config.parent / ".lock").read_text().split()
            holders |= {config.parent.name: int(words[1])} if len(words) > 1 else {}
    return {name: holder for name, holder in holders.items() if psutil.pid_exists(holder)}


def test_trials_equal_single_runs_to_the_last_bit_whatever_ran_before_them(
    whole: Path, place: Path, tmp_path: Path, bert: Path
) -> None:
    found = trials(whole)
    names = {5e-3: f"0.005-{BATCH}-{EPOCHS}-0", 1e-3: f"0.001-{BATCH}-{EPOCHS}-0"}
    assert set(found) == set(names.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for lr, name in names.items():  # the other way round
            alone = run_trial(
                RunSettings(str(bert), str(tmp_path / name), save_model=False),
                DataSettings("rte", str(place / "data"), max_length=32),
                TrainSettings(lr=lr, batch_size=BATCH, epochs=EPOCHS, precision="fp32"),
            )
            assert found[name]["epochs"] == alone["epochs"]
            log = whole / f"trials/rte/tiny/{name}/log.jsonl"
            assert losses(log) == losses(tmp_path / name / "log.jsonl")
    finally:
        torch.set_num_threads(threads)


def losses(log: Path) -> list[float]:
    """Every training loss that a run logged."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_grown_grid_runs_only_what_is_new_and_a_fault_stops_no_other_trial(
    cluster: Any, whole: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole, tmp_path / "grid")
    joined = ["--address", cluster.address, "--output", str(output)]
    stamps = {p: p.stat().st_mtime_ns for p in output.glob("trials/*/*/*/result.json")}
    main([*flags, *joined])
    assert tables(output) == tables(whole)

    foreign = output / f"trials/rte/tiny/0.001-{BATCH}-{EPOCHS}-1"  # where a trial cannot live
    foreign.mkdir()
    (foreign / "config.json").write_text('{"lr": 1}')
    more = [*flags, "--seeds", "2", *joined]
    with pytest.raises(SystemExit) as stop:
        main(more)
    assert stop.value.code == 1
    assert json.loads((foreign / "failed.json").read_text())["attempts"] == 1
    assert "another run's folder" in (output / "summary.md").read_text()
    assert f"0.005-{BATCH}-{EPOCHS}-1" in trials(output)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps

    (foreign / "config.json").unlink()
    main(more)  # what failed is tried again
    assert len(trials(output)) == 4
    assert not (foreign / "failed.json").exists()
    assert "4 trials, 3 of them finished before" in capsys.readouterr().out


def test_a_killed_worker_costs_its_trial_an_attempt_a_dead_node_nothing_but_time(
    cluster: Any, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial whose worker was killed runs again in halves, and on another node as it was."""
    second = cluster.add_node(
        num_cpus=1, node_ip_address="127.0.0.2", object_store_memory=80 * 2**20
    )
    cluster.wait_for_nodes()
    output, struck = tmp_path / "grid", {}

    def strike() -> None:
        """Kill the worker of one node, and the whole of the other node."""
        workers: dict[str, int] = {}
        try:
            while len(workers) < 2:
                workers.update(until(lambda: dict(running(output).items() - workers.items())))
                for pid in workers.values():
                    os.kill(pid, signal.SIGSTOP)  # who comes first waits for the other
            for name, pid in workers.items():
                raylet = psutil.Process(pid).parent().cmdline()
                struck["node" if "--node_ip_address=127.0.0.2" in raylet else "worker"] = name
            os.kill(workers[struck["worker"]], signal.SIGKILL)
            cluster.remove_node(second, allow_graceful=False)
        finally:
            for pid in workers.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        main([*flags, "--address", cluster.address, "--output", str(output)])
    finally:
        thread.join(SECONDS)
        if second in cluster.list_all_nodes():
            cluster.remove_node(second, allow_graceful=False)
    parts = {name: found["settings"]["accumulation"] for name, found in trials(output).items()}
    assert parts == {struck["worker"]: 2, struck["node"]: 1}
    said = capsys.readouterr().out
    assert "its process died" in said
    assert "once more, every batch in 2 parts" in said


def test_a_grid_killed_and_stopped_in_the_middle_ends_with_the_tables_of_an_unbroken_one(
    cluster: Any,
    whole: Path,
    flags: list[str],
    tmp_path: Path,
    start: Callable[[list[str], Path], subprocess.Popen[bytes]],
) -> None:
    """On a Ray of its own, which ends with the grid and lets in nobody without its token."""
    output = tmp_path / "grid"
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        grid = start([*flags, "--workers", "1"], output)
        (worker,) = until(lambda: running(output)).values()
        family = psutil.Process(grid.pid).children(recursive=True)
        if number == signal.SIGTERM:
            os.kill(worker, signal.SIGSTOP)  # it would be done before the strangers are
            try:
                assert strangers(family) == ["out", "in"]
            finally:
                os.kill(worker, signal.SIGCONT)
        grid.send_signal(number)
        assert grid.wait(SECONDS) == status
        until(lambda family=family: not any(alive(process) for process in family))
    assert not (tmp_path / ".ray").exists()  # no token is left at home
    main([*flags, "--address", cluster.address, "--output", str(output)])
    assert tables(output) == tables(whole)
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted([".lock", "grid.json", "tokenised", "trials", *TABLES])


def strangers(family: list[psutil.Process]) -> list[str]:
    """Who comes in to a grid's Ray: with a token of their own, and with the grid's."""
    (raylet,) = [process for process in family if process.name() == "raylet"]
    given = dict(word.partition("=")[::2] for word in raylet.cmdline())
    code = STRANGER.format(given["--gcs-address"])
    told = []
    for token in ("0" * 64, raylet.environ()["RAY_AUTH_TOKEN"]):
        own = bare() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        tried = subprocess.run([sys.executable, "-c", code], env=own, timeout=SECONDS)
        told.append("out" if tried.returncode else "in")
    return told


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
