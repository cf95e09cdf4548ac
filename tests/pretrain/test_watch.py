"""The watch over ranks: whoever is killed, hangs or fails is named, and nobody waits for ever."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.launch import command
from tests.pretrain import watched_rank

RANKS, HOST = 3, os.uname().nodename
REST = f"{watched_rank.KEPT}; run the same command again to go on\n"


@contextmanager
def ranks(folder: Path, act: str) -> Iterator[list[BaseProcess]]:
    """Processes that found one another and now do what `act` says."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([watched_rank.__name__])
    port = command(1)[command(1).index("--master_port") + 1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    started: list[BaseProcess] = []
    for rank in range(RANKS):
        own = place | {"RANK": str(rank)}
        started.append(context.Process(target=watched_rank.run, args=(act, folder, own)))
        started[-1].start()
    try:
        end = time.monotonic() + 60
        while len(list(folder.glob("*.ready"))) < RANKS and time.monotonic() < end:
            time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def ends(process: BaseProcess, folder: Path, rank: int) -> tuple[int | None, str]:
    """The exit status and what a rank printed to stderr; it must end by itself."""
    process.join(60)
    return process.exitcode, (folder / f"{rank}.err").read_text()


@pytest.mark.parametrize("act, lost", [("train", 0), ("wait", 1)])
def test_a_killed_rank_is_named_by_the_lowest_other_one(
    tmp_path: Path, act: str, lost: int
) -> None:
    with ranks(tmp_path, act) as started:
        started[lost].kill()
        pid = started[lost].pid
        told = f"error: rank {lost} (process {pid} on {HOST}) was killed or died; {REST}"
        speaker, other = (rank for rank in range(RANKS) if rank != lost)
        assert ends(started[speaker], tmp_path, speaker) == (1, told)
        assert ends(started[other], tmp_path, other) == (1, "")


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    lost = 0  # the others lose the store with it
    with ranks(tmp_path, "train") as started:
        pid = started[lost].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        named = f"error: rank {lost} (process {pid} on {HOST}) has given no sign of life for 6 s"
        status, errors = ends(started[1], tmp_path, 1)
        assert status == 1 and errors.startswith(named)
        assert ends(started[2], tmp_path, 2) == (1, "")


def test_a_rank_that_fails_alone_is_named(tmp_path: Path) -> None:
    with ranks(tmp_path, "fail") as started:
        rank = f"rank 1 (process {started[1].pid} on {HOST})"
        named = f"error: {rank} ended with an error of its own: a bug"
        assert ends(started[0], tmp_path, 0) == (1, f"{named}; {REST}")
        assert ends(started[2], tmp_path, 2) == (1, "")


def test_a_rank_that_ended_well_is_not_missed(tmp_path: Path) -> None:
    with ranks(tmp_path, "leave_early") as started:
        ended = [ends(process, tmp_path, rank) for rank, process in enumerate(started)]
        assert ended == [(0, "")] * RANKS


def test_a_step_that_never_ends_cannot_hold_up_a_signal(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    with ranks(tmp_path, "wait") as started:
        for process, number in zip(started, numbers, strict=True):
            assert process.pid is not None
            os.kill(process.pid, number)
        ended = [ends(process, tmp_path, rank) for rank, process in enumerate(started)]
    assert [status for status, _ in ended] == [143, 130, 143]
    for rank, (number, (_, errors)) in enumerate(zip(numbers, ended, strict=True)):
        told = f"error: rank {rank} stopped by {number.name} within a step, which did not end"
        assert errors == f"{told} in time; {REST}"
