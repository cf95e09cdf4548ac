"""A disk that fills up, or cannot be written, under the sharder: a real one, held in memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.sharder import can_mount
from tests.data_prep.conftest import quiet_environment

pytestmark = pytest.mark.skipif(
    not can_mount(), reason="this machine lets no process mount a disk of its own (unshare -rm)"
)
SIZES = ("4k", "60k", "250k")  # of the disk; the shards of the corpus have about 400
# All in one process, since a start takes seconds: full, then read-only, then large enough.
SCRIPT = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from data_prep.shard import main
from data_prep.tokenization import load_tokenizer, save_tokenizer

disk, copies, sizes, tokenizer, *arguments = sys.argv[1:]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

def attempt():
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*arguments, "--output", disk + "/out"])
        except SystemExit as ended:
            status = ended.code
    finished = sorted(path.name for path in Path(disk).rglob("*.h5"))
    hidden = [path.name for path in Path(disk).rglob(".*") if path.suffix in (".part", ".old")]
    return [status, errors.getvalue().splitlines()[-1:], finished, hidden]

told = {}
for size in sizes.split():
    mount(f"size={size}")
    full = attempt()
    mount("remount,ro")
    read_only = attempt()
    mount("remount,rw,size=100m")
    told[size] = [full, read_only, attempt()]
    subprocess.run(["cp", "-a", disk + "/out", f"{copies}/{size}"], check=True)
    subprocess.run(["umount", disk], check=True)
mount("size=4k")
try:
    save_tokenizer(load_tokenizer(tokenizer), Path(disk))
except OSError as error:
    told["tokenizer"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Path,
    tokenizer_folder: Path,
    repository: Path,
) -> tuple[dict[str, Any], Path]:
    """What came of each attempt, by the disk's size; where the folders were copied to."""
    folder = tmp_path_factory.mktemp("disks")
    (folder / "disk").mkdir()
    given = ["--input", corpus, "--tokenizer", tokenizer_folder, "--rows_per_shard", "150"]
    places = [folder / "disk", folder, " ".join(SIZES), tokenizer_folder]
    words = ["unshare", "-rm", sys.executable, "-c", SCRIPT, *places, *given, "--workers", "1"]
    done = subprocess.run(
        [*map(str, words)], cwd=repository, capture_output=True, text=True, env=quiet_environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_line_and_keeps_what_is_finished(
    size: str, told: tuple[dict[str, Any], Path]
) -> None:
    (status, errors, finished, hidden), _, _ = told[0][size]
    assert status == 1
    assert "No space left on device" in errors[0] and "run the same command again" in errors[0]
    assert not hidden
    assert bool(finished) == (size != "4k")


@pytest.mark.parametrize("size", SIZES)
def test_a_read_only_disk_is_found_before_the_work(
    size: str, told: tuple[dict[str, Any], Path]
) -> None:
    (_, _, before, _), (status, errors, finished, _), _ = told[0][size]
    assert status == 2
    assert "Read-only file system" in errors[0]
    assert finished == before


@pytest.mark.parametrize("size", SIZES)
def test_with_room_the_same_command_writes_the_bytes_of_an_unbroken_run(
    size: str,
    told: tuple[dict[str, Any], Path],
    corpus: Path,
    run_here: Callable[..., Path],
    digests: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    assert told[0][size][2][0] == 0
    whole = run_here(tmp_path / "out", corpus, flags="--rows_per_shard 150 --workers 1")
    assert digests(told[1] / size) == digests(whole)


def test_a_tokenizer_that_does_not_fit_is_a_fault_of_the_disk(
    told: tuple[dict[str, Any], Path],
) -> None:
    """The library raises a bare Exception for it."""
    assert "No space left on device" in told[0]["tokenizer"]
