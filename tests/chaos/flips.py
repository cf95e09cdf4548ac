"""Single bytes changed in checkpoints and shards: every one must be noticed before it is used."""

import random
import shutil
from pathlib import Path

from potstill.console import progress
from potstill.errors import InputError
from pretrain.checkpoint import verify_checkpoint
from tests.chaos.common import Outcome
from tests.chaos.runs import Setup, shares, unbroken
from tests.chaos.shard_flips import flip_shards


def run(seed: int, count: int, folder: Path) -> Outcome:
    """Flip so many bytes, half of them in a checkpoint, the others in shards."""
    half = count // 2
    checkpoint = copy_checkpoint(unbroken(Setup(2, 1), folder).run, folder)
    failures, flipped = flip_checkpoint(seed, half, checkpoint)
    shards = folder / "shards"
    shards.mkdir()
    failures += flip_shards(seed, count - half, shards)
    details: dict[str, int | float | str] = {
        "shards, manifest, tokenizer": count - half,
        "checkpoint": f"{half} ({shares(flipped)})",
    }
    return Outcome("flips", count, count - len(failures), failures, details)


def copy_checkpoint(run: Path, folder: Path) -> Path:
    """A copy of a real checkpoint, with projections and a memory, of a run that kills need too."""
    newest = max(run.glob("checkpoints/step-*"))
    return Path(shutil.copytree(newest, folder / "checkpoint" / newest.name))


def flip_checkpoint(seed: int, count: int, checkpoint: Path) -> tuple[list[str], list[str]]:
    """Flip bytes of a checkpoint's files, one at a time; failures, and each case's file."""
    verify_checkpoint(checkpoint)  # whole before
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    failures, flipped = [], []
    for case in progress(range(count), unit="flip"):
        drawn = random.Random(f"{seed}-{case}")
        path = drawn.choice(files)
        offset, mask = drawn.randrange(path.stat().st_size), drawn.randint(1, 255)
        fault = _flip(checkpoint, path, offset, mask)
        flipped.append(path.name)
        if fault:
            failures.append(f"flips {seed}-{case}: {path} byte {offset} xor {mask}: {fault}")
    verify_checkpoint(checkpoint)  # and whole again
    return failures, flipped


def _flip(checkpoint: Path, path: Path, offset: int, mask: int) -> str | None:
    """What is wrong about how a changed byte was met; the byte is put back."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[offset] ^= mask
    path.write_bytes(changed)
    try:
        verify_checkpoint(checkpoint)
    except InputError as error:
        return None if path.name in str(error) else f"the message does not name it: {error}"
    except Exception as error:  # whatever it is, it is the finding
        return f"{error!r}"
    finally:
        path.write_bytes(content)
    return "not noticed"
