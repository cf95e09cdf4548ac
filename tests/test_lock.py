"""The lock on a folder: one process at a time, and nothing left of one that died."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from potstill.errors import InputError
from potstill.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from potstill.lock import hold
lock = hold(Path(sys.argv[1]), "in use")
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        host = os.uname().nodename
        told = rf"^in use \(process {process.pid} on {host} holds {path}\)$"
        for _ in range(2):  # being refused does not release it
            with pytest.raises(InputError, match=told):
                hold(path, "in use")


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        process.kill()
        process.wait()
        with hold(path, "in use"):
            assert path.read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path, "in use"):
        pass
    with holder(path):
        pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = hold(path, "in use")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # a loader worker, which outlives the lock of its trainer
        os.read(reading, 1)
        os._exit(0)
    lock.release()
    with holder(path):
        pass
    os.write(writing, b"\0")
    os.waitpid(child, 0)


def test_a_lock_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match="lock: cannot be written"):
        hold(tmp_path / "lock", "in use")
