"""Single bytes changed in shards, their manifest and their tokenizer: each must be noticed."""

import os
import random
import shutil
from pathlib import Path

from data_prep.shard import parse, shard
from data_prep.shard_format import MANIFEST, read_manifest, verify_files
from potstill.errors import InputError

TEXT = "\n\n".join(f"Document {n} says: {n * n} is {n} times {n}, no less." for n in range(300))


def flip_shards(seed: int, count: int, folder: Path) -> list[str]:
    """Flip so many bytes, one at a time, in shards made in `folder`; what was not noticed."""
    shards = make_shards(folder)
    files = sorted(path for path in shards.glob("*") if path.is_file())
    files += sorted((shards / "tokenizer").iterdir())
    failures = []
    for case in range(count):
        draw = random.Random(f"{seed}-{case}-shards")
        path = draw.choice(files)
        offset, mask = draw.randrange(path.stat().st_size), draw.randint(1, 255)
        flip(path, offset, mask)
        if fault := _fault(shards, path):
            failures.append(f"flips {seed}-{case}: {path} byte {offset} xor {mask}: {fault}")
        flip(path, offset, mask)
    verify(shards)  # and whole again
    return failures


def make_shards(folder: Path) -> Path:
    """A few small shards of both splits, with a tokenizer learned from their text."""
    text, shards = folder / "text.txt", folder / "made"
    text.write_text(TEXT)
    sizes = "--train_tokenizer 300 --seq_length 32 --rows_per_shard 100 --workers 1"
    shard(parse(["--input", str(text), "--output", str(shards), *sizes.split()]))
    shutil.rmtree(shards / ".sharding")  # settings of the program that nothing reads in training
    return shards


def flip(path: Path, offset: int, mask: int) -> None:
    """Change a byte in place; the same again changes it back."""
    with open(path, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ mask]), offset)


def verify(shards: Path) -> None:
    """What `shard.py --verify` and a start of the trainer do."""
    manifest = read_manifest(shards)
    verify_files(shards, manifest, manifest.files + manifest.tokenizer_files)


def _fault(shards: Path, path: Path) -> str | None:
    """What is wrong about how a changed byte was met."""
    try:
        verify(shards)
    except InputError as error:
        named = path.name in str(error) or path.name == MANIFEST
        return None if named else f"the message does not name it: {error}"
    except Exception as error:  # whatever it is, it is the finding
        return repr(error)
    return "not noticed"
