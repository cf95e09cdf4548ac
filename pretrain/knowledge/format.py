"""Stored knowledge on disk: written, described and checked only here.

KNOWLEDGE/identity.json     what is stored, of whom: written first, so that a killed run goes on
KNOWLEDGE/knowledge.json    the same with every file's checksum: sealed, written last
KNOWLEDGE/train-00000-of-00004.bin
    records of consecutive slots; slot = copy * rows + row. A record is a row's fields behind one
    another (`entries.record_type`). Under zstd each record is a frame of its own, with its size and
    checksum, and a table of int64 offsets, one more than records, stands in front. The last 32
    bytes are the SHA-256 of all before them, by which a run that goes on knows a whole file.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdCompressor

from data_prep.shard_format import TRAIN, VALIDATION
from data_prep.typed_json import build
from potstill.console import progress
from potstill.errors import InputError
from potstill.files import read_sealed_json, sha256_of, write_sealed_json

FORMAT_VERSION = 1
IDENTITY, MANIFEST = "identity.json", "knowledge.json"
SEAL_BYTES = 32
ZSTD_LEVEL = 3
_AGAIN = "store it again into another folder"


@dataclass(frozen=True)
class StoredFeature:
    """A feature that objectives may ask for: its kind, layer or positions; only [CLS] of it."""

    kind: str
    at: Any
    first_token: bool


@dataclass(frozen=True)
class Contents:
    """What is stored, of whom: it decides every byte.

    Attributes:
        teacher: fingerprint of its weights. teacher_name: as it was given, for people.
            teacher_config: its Hugging Face config. trained_head: whether it has an MLM head.
        tokenizer, shards: fingerprint of the tokenizer, checksum of the shards' manifest.
        rows: of each split that are stored.
        copies: masked versions of each training row. batches_version: of how masks are drawn.
        layers: what `--layers` is for students of this knowledge.
        keep …: the cut, "" where nothing is cut. logits_top_k: 0 stores all.
        precision: that the teacher ran in, with `micro_batch` rows at a time.
    """

    teacher: str
    teacher_name: str
    teacher_config: dict[str, Any]
    trained_head: bool
    tokenizer: str
    shards: str
    seq_length: int
    sep_id: int
    rows: dict[str, int]
    mlm_probability: float
    mask_whole_words: bool
    copies: int
    seed: int
    batches_version: int
    objective: str
    layers: str
    features: list[StoredFeature]
    keep: str
    keep_depth: str
    keep_length: str
    keep_width: str
    kd_temperature: float
    logits_top_k: int
    dtype: str
    compression: str
    precision: str
    micro_batch: int
    rows_per_file: int

    def slots(self, split: str) -> int:
        """Records of a split: every copy of a training row, every validation row once."""
        return self.rows[split] * (self.copies if split == TRAIN else 1)

    @property
    def files(self) -> int:
        """How many files hold the records of both splits."""
        return sum(-(-self.slots(split) // self.rows_per_file) for split in (VALIDATION, TRAIN))


@dataclass(frozen=True)
class KnowledgeFile:
    """A file of records: its name, split, number of records, and SHA-256."""

    name: str
    split: str
    records: int
    sha256: str


@dataclass(frozen=True)
class KnowledgeManifest:
    """What `knowledge.json` says."""

    format_version: int
    contents: Contents
    files: list[KnowledgeFile]

    def of_split(self, split: str) -> list[KnowledgeFile]:
        """The files of a split, in the order of their slots."""
        return [file for file in self.files if file.split == split]


@dataclass(frozen=True)
class Part:
    """A file that is to be written: its name, split, and slots."""

    name: str
    split: str
    slots: range


def parts_of(contents: Contents) -> list[Part]:
    """All files of a knowledge, in the order of their slots; validation first, for a dry look."""
    parts = []
    for split in (VALIDATION, TRAIN):
        total, size = contents.slots(split), contents.rows_per_file
        starts = range(0, total, size)
        for number, start in enumerate(starts):
            name = f"{split}-{number:05d}-of-{len(starts):05d}.bin"
            parts.append(Part(name, split, range(start, min(start + size, total))))
    return parts


def file_image(records: NDArray[Any], compression: str) -> bytes:
    """The bytes of a file of records (n,), sealed."""
    body = _compressed(records) if compression == "zstd" else records.view(np.uint8).data
    return b"".join([body, hashlib.sha256(body).digest()])


def _compressed(records: NDArray[Any]) -> bytes:
    squeeze = ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress
    frames = [squeeze(record.tobytes()) for record in records]
    first = 8 * (len(frames) + 1)
    offsets = first + np.cumsum([0, *map(len, frames)], dtype="<i8")
    return b"".join([offsets.tobytes(), *frames])


def is_sealed(path: Path) -> bool:
    """Whether a file is there and whole, by the seal at its end."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - SEAL_BYTES
            digest = hashlib.sha256()
            left = size
            while left > 0 and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
            return size > 0 and digest.digest() == file.read(SEAL_BYTES)
    except OSError:
        return False


def write_manifest(folder: Path, contents: Contents, files: Sequence[KnowledgeFile]) -> None:
    """Write `knowledge.json`; the knowledge is whole from then on."""
    manifest = KnowledgeManifest(FORMAT_VERSION, contents, list(files))
    write_sealed_json(folder / MANIFEST, asdict(manifest))


def read_knowledge_manifest(folder: Path) -> KnowledgeManifest:
    """Read and check what a folder of knowledge says.

    Raises:
        InputError: not whole, not as it was written, malformed, or of another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = (folder / IDENTITY).is_file()
        state = (
            "is not finished: run the same cache_knowledge.py again"
            if begun
            else ("is no folder of pretrain/cache_knowledge.py")
        )
        raise InputError(f"--knowledge {folder}: {state} (it has no {MANIFEST})")
    try:
        fields = read_sealed_json(path)
        version = fields.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise InputError(
                f"{path} is of format version {version}, and this Potstill reads {FORMAT_VERSION}; "
                f"{_AGAIN}"
            )
        manifest: KnowledgeManifest = build(KnowledgeManifest, fields, "the manifest")
        _check_files(manifest)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or malformed ({error}); copy it again, or {_AGAIN}"
        ) from error
    return manifest


def _check_files(manifest: KnowledgeManifest) -> None:
    """Raises ValueError for files that are not those of the contents."""
    contents = manifest.contents
    if contents.rows.keys() != {TRAIN, VALIDATION} or not all(contents.rows.values()):
        raise ValueError(f"rows are {contents.rows}")
    if min(contents.copies, contents.rows_per_file, contents.seq_length) < 1:
        raise ValueError("copies, rows_per_file and seq_length must be positive")
    if contents.compression not in ("none", "zstd"):
        raise ValueError(f"compression is {contents.compression[:40]!r}")
    if contents.files != len(manifest.files):  # before so many are listed
        raise ValueError(f"it names {len(manifest.files)} files, its rows need {contents.files}")
    expected = [(part.name, part.split, len(part.slots)) for part in parts_of(contents)]
    if [(file.name, file.split, file.records) for file in manifest.files] != expected:
        raise ValueError("its files are not those of its rows")
    for file in manifest.files:
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise ValueError(f"the sha256 of {file.name} is {file.sha256[:70]!r}")


def damaged(folder: Path, files: Iterable[KnowledgeFile]) -> list[str]:
    """What is wrong with files by their checksums, for messages; empty where nothing is."""
    checked = progress(list(files), desc="checking knowledge", unit=" files", delay=5.0)
    return [fault for file in checked if (fault := _damage(folder / file.name, file))]


def _damage(path: Path, file: KnowledgeFile) -> str | None:
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}); copy it again, or {_AGAIN}"
    if found == file.sha256:
        return None
    return (
        f"{path} is corrupted: its SHA-256 is {found[:12]}…, the manifest has "
        f"{file.sha256[:12]}…; copy it again, or {_AGAIN}"
    )
