"""The launcher that is gone: noticed by its ranks, which would otherwise go on for nobody."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pretrain.launcher import look
from tests.launch import command, environment

REPOSITORY = Path(__file__).resolve().parents[2]
RANK = """
import os, time
from pretrain.launcher import Launcher
launcher = Launcher()
print("ready", os.getpid(), os.getppid(), launcher.is_gone(), flush=True)
while not launcher.is_gone():
    time.sleep(0.05)
print("gone", flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[2:]))"


@contextmanager
def started(
    line: list[str], folder: Path, **variables: str
) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """A process above a rank, the rank's id and that of its parent; all are killed at the end."""
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(folder) | {"PYTHONPATH": str(REPOSITORY)} | variables,
    )
    rank = parent = 0
    try:
        words = next_line(process, "ready").split()
        assert words[3] == "False"
        rank, parent = int(words[1]), int(words[2])
        yield process, rank, parent
    finally:
        for pid in (process.pid, parent, rank):
            if look(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def next_line(process: "subprocess.Popen[str]", start: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith(start))


def parent_of(command: list[str], name: str) -> list[str]:
    """A command that waits for another one, and has a word for the look of it."""
    return [sys.executable, "-c", PARENT, name, *command]


def rank_of(folder: Path) -> list[str]:
    (folder / "rank.py").write_text(RANK)
    return [sys.executable, str(folder / "rank.py")]


def test_a_rank_notices_that_its_launcher_was_killed(tmp_path: Path) -> None:
    line = parent_of(rank_of(tmp_path), "torchrun")
    with started(line, tmp_path, TORCHELASTIC_RUN_ID="1") as (launcher, *_):
        launcher.kill()
        assert next_line(launcher, "gone")


def test_a_rank_notices_that_deepspeeds_runner_was_killed_above_the_launcher(
    tmp_path: Path,
) -> None:
    launch = parent_of(rank_of(tmp_path), "deepspeed.launcher.launch")
    with started(parent_of(launch, "bin/deepspeed"), tmp_path, CROSS_RANK="0") as (runner, *_):
        runner.kill()
        assert next_line(runner, "gone")


@pytest.mark.parametrize("variables", [{}, {"CROSS_RANK": "0"}])
def test_a_shell_that_ends_above_is_no_reason_to_stop(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    launch = parent_of(rank_of(tmp_path), "deepspeed.launcher.launch")
    line = parent_of(launch if variables else rank_of(tmp_path), "a shell")
    with started(line, tmp_path, **variables) as (shell, rank, _):
        shell.kill()
        shell.wait()
        says_something, _, _ = select.select([shell.stdout], [], [], 0.3)
        assert not says_something and look(rank)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_real_launcher_is_known(tmp_path: Path) -> None:
    rank_of(tmp_path)
    line = command(1, tmp_path / "rank.py")
    with started(line, tmp_path) as (runner, _, launch):
        runner.kill()
        assert next_line(runner, "gone")
        assert look(launch)
