"""Files that appear whole or not at all: written beside, flushed, renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _flush_folder(folder: Path) -> None:
    """A rename is durable only once its folder is flushed too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically; an earlier file is replaced only at the end.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


_SEAL = re.compile(rb'"checksum": "([0-9a-f]{64})"')
_ZEROS = b'"checksum": "' + b"0" * 64 + b'"'


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as JSON with a last field `checksum`, in which any changed byte shows.

    It is the SHA-256 of the file itself, its own 64 digits taken as zeros.
    """
    text = json.dumps({**value, "checksum": "0" * 64}, indent=2, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.encode().rpartition(_ZEROS)
    write_bytes(path, head + _ZEROS.replace(b"0" * 64, digest.encode()) + tail)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without the checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as it was written, or was never sealed.
    """
    content = path.read_bytes()
    seals = list(_SEAL.finditer(content))
    if not seals:
        raise ValueError("it holds no checksum")
    seal = seals[-1]  # the last field
    plain = content[: seal.start()] + _ZEROS + content[seal.end() :]
    if hashlib.sha256(plain).hexdigest() != seal[1].decode():
        raise ValueError("it is damaged: its checksum does not fit")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict) or value.pop("checksum", None) != seal[1].decode():
        raise ValueError("its checksum is not its last field")
    return value


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; it takes the place of `path` only if the block ends well.

    Raises:
        OSError: the folder cannot be written; `path` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in [*beside.rglob("*"), beside]:
            handle = os.open(file, os.O_RDONLY)  # a folder too: its names must be durable
            os.fsync(handle)
            os.close(handle)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(beside, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _flush_folder(path.parent)


def is_leftover(path: Path, *names: str) -> bool:
    """Whether a process that was killed left this behind while it wrote one of `names`, or any."""
    name = "|".join(map(re.escape, names)) or ".+"
    return re.fullmatch(rf"\.(?:{name})\.\d+\.(?:part|old)", path.name) is not None


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove leftovers at any depth; whoever calls it must hold the folder."""
    for path in [path for path in folder.rglob(".*") if is_leftover(path, *names)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; reads it in pieces of constant size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
