"""Checkpoints are whole or not there, damage is noticed, and the newest whole one is taken."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from potstill.errors import InputError
from pretrain.checkpoint import (
    OPTIMIZER,
    RECORD,
    WEIGHTS,
    Progress,
    checkpoints_in,
    load_state,
    newest_whole,
    read_record,
    remove_checkpoints,
    update_progress,
    verify_checkpoint,
)
from tests.launch import REPOSITORY
from tests.pretrain.checkpoints import tiny_state, write_checkpoint

FILES = (WEIGHTS, OPTIMIZER, RECORD)


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    path.write_bytes(content)


def test_what_is_loaded_is_bitwise_what_was_saved(tmp_path: Path) -> None:
    state, frozen = load_state(write_checkpoint(tmp_path, 4))
    saved = tiny_state(4)
    for group in ("weights", "buffers", "moments"):
        ours, theirs = getattr(state, group), getattr(saved, group)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), group
    assert (state.numbers, state.scale) == ({"step": 7.0}, {})
    assert (state.skipped, state.optimizer) == (1, "AdamW")
    assert frozen["cls.bias"].equal(torch.ones(2))


def test_the_record_gives_back_what_it_was_given(tmp_path: Path) -> None:
    progress = Progress(step=4, tokens=9, flops=1e18, seconds=2.5, validated=3, rolled_back=1)
    record = read_record(
        write_checkpoint(tmp_path, 4, progress=progress, probe={"kd": float("nan")})
    )
    assert record.progress == progress and record.world_size == 2 and record.zero_stage == 1
    assert record.probe["kd"] != record.probe["kd"], "what was not finite comes back so"


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_noticed_and_its_file_named(tmp_path: Path, name: str) -> None:
    folder, draw = write_checkpoint(tmp_path, 4), random.Random(name)
    whole = (folder / name).read_bytes()
    for _ in range(60):
        flip(folder / name, draw)
        with pytest.raises(InputError, match=name):
            verify_checkpoint(folder)
        (folder / name).write_bytes(whole)
    verify_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "longer"])
def test_files_that_are_not_whole_are_noticed(tmp_path: Path, name: str, how: str) -> None:
    folder = write_checkpoint(tmp_path, 4)
    content = (folder / name).read_bytes()
    if how == "missing":
        (folder / name).unlink()
    else:
        changed = {"cut": content[:-1], "empty": b"", "longer": content + b" "}
        (folder / name).write_bytes(changed[how])
    with pytest.raises(InputError, match=name):
        verify_checkpoint(folder)


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, 4)
    older, newest = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 12)
    assert newest_whole(tmp_path) == newest
    flip(newest / OPTIMIZER, random.Random(1))
    assert newest_whole(tmp_path) == older
    assert OPTIMIZER in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(
    tmp_path: Path,
) -> None:
    assert newest_whole(tmp_path) is None, "a fresh folder starts fresh"
    for step in (4, 8):
        (write_checkpoint(tmp_path, step) / WEIGHTS).write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole.*remove the folder"):
        newest_whole(tmp_path)


def test_a_later_validation_is_noted_without_touching_the_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 4)
    before = (folder / WEIGHTS).stat()
    update_progress(folder, Progress(step=4, validated=4))
    assert verify_checkpoint(folder).progress.validated == 4
    assert (folder / WEIGHTS).stat() == before


def test_removed_checkpoints_are_gone_and_the_others_stay(tmp_path: Path) -> None:
    old, new = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    remove_checkpoints([old])
    assert checkpoints_in(tmp_path) == [new] and list(tmp_path.iterdir()) == [new]


SAVE_FOR_EVER = """
import itertools, os, sys
from pathlib import Path
from tests.pretrain.checkpoints import write_checkpoint
for folder in sys.argv[1:]:  # a process for each, forked from one that has imported
    process = os.fork()
    for step in itertools.count(1) if process == 0 else ():
        write_checkpoint(Path(folder), step)
    print("forked", process, flush=True)
    os.wait()
"""


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """A process that does nothing but save; no mark of a moment, so any byte may be the last."""
    draw = random.Random(5)
    folders = [tmp_path / str(case) for case in range(3)]
    saving = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert saving.stdout is not None
    try:
        for folder in folders:
            words = next(line for line in saving.stdout if line.startswith("forked"))
            process = int(words.split()[1])
            while not checkpoints_in(folder):
                assert saving.poll() is None
                time.sleep(0.01)
            time.sleep(draw.random() * 0.1)
            os.kill(process, signal.SIGKILL)
            while Path(f"/proc/{process}").exists():  # until it is collected
                time.sleep(0.01)
            found = checkpoints_in(folder)
            assert found
            for checkpoint in found:
                verify_checkpoint(checkpoint)
            assert newest_whole(folder) == found[-1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(saving.pid, signal.SIGKILL)
        saving.communicate()


def test_a_folder_without_its_record_is_damaged_and_not_nothing(tmp_path: Path) -> None:
    """Else a run would begin again, silently, over what it had."""
    (write_checkpoint(tmp_path, 4) / RECORD).unlink()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        newest_whole(tmp_path)
