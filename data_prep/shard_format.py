"""The shards on disk: HDF5 files of token rows and the manifest that describes them.

A shard holds one dataset, `input_ids` (rows, seq_length), uint16 (uint32 when the vocabulary has
more than 65,535 tokens), stored contiguously, so that rows are read by a memory map at the
dataset's place in the file. Layouts are written and read only here.
"""

import json
import mmap
import resource
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from potstill.errors import InputError
from potstill.files import sha256_of, write_json

FORMAT_VERSION = 1
DATASET = "input_ids"
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class SplitSize:
    """Size of a split: `rows`, `tokens` (positions that are not padding) and `padding`."""

    rows: int
    tokens: int
    padding: int

    def __getitem__(self, name: str) -> int:
        return int(getattr(self, name))


@dataclass(frozen=True)
class ShardFile:
    """A file of the folder: its relative name, split, rows (0 for the tokenizer's) and SHA-256."""

    name: str
    split: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a folder of shards."""

    format_version: int
    seq_length: int
    seed: int
    vocab_size: int
    tokenizer_fingerprint: str
    special_ids: dict[str, int]  # pad, cls, sep, mask
    documents: int
    splits: dict[str, SplitSize]  # train, validation
    files: list[ShardFile]  # the shards, in the order of their rows
    tokenizer_files: list[ShardFile]
    sources: list[dict[str, Any]]
    packing: str
    validation_fraction: float
    rows_per_shard: int
    skipped_texts: int  # left out under --on_bad_text skip

    def of_split(self, split: str) -> list[ShardFile]:
        """The shards of `split`, in the order of their rows."""
        return [file for file in self.files if file.split == split]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.uint32).newbyteorder("<")


def shard_image(rows: np.ndarray) -> bytes:
    """The bytes of a shard with `rows` (n, seq_length), the same every time.

    The image is built in memory: a disk that fills up while HDF5 writes leaves a file that opens
    again and claims all its rows.
    """
    with h5py.File(
        "image", "w", driver="core", backing_store=False, libver=("earliest", "v108")
    ) as file:
        file.create_dataset(DATASET, data=rows, track_times=False)  # contiguous: no chunks given
        file.flush()
        return file.id.get_file_image()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`; the folder is complete from then on."""
    write_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder of shards.

    Raises:
        InputError: missing or malformed manifest, another format version, or a file name that
            leaves the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder} has no {MANIFEST}: it is no finished folder of data_prep/shard.py"
        )
    try:
        fields = json.loads(path.read_bytes())
        version = fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is malformed ({error!r}); shard the corpus again") from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}; "
            "shard the corpus again"
        )
    try:
        manifest = _manifest_from(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is malformed ({error!r}); shard the corpus again") from error
    _check_names(path, manifest)
    return manifest


def _manifest_from(fields: dict[str, Any]) -> Manifest:
    splits = {name: SplitSize(**size) for name, size in fields.pop("splits").items()}
    files = [ShardFile(**file) for file in fields.pop("files")]
    tokenizer_files = [ShardFile(**file) for file in fields.pop("tokenizer_files")]
    manifest = Manifest(splits=splits, files=files, tokenizer_files=tokenizer_files, **fields)
    if {TRAIN, VALIDATION} - set(splits) or {"pad", "cls", "sep", "mask"} - set(
        fields["special_ids"]
    ):
        raise ValueError("splits or special_ids are incomplete")
    if manifest.seq_length < 3 or any(file.rows < 1 for file in files):
        raise ValueError("a size is not positive")
    for name, size in splits.items():
        if size.rows != sum(file.rows for file in manifest.of_split(name)):
            raise ValueError(f"the rows of {name} do not add up")
    return manifest


def _check_names(path: Path, manifest: Manifest) -> None:
    for file in manifest.files + manifest.tokenizer_files:
        name = Path(file.name)
        if name.is_absolute() or ".." in name.parts:
            raise InputError(
                f"{path} names {file.name!r}, outside its folder; do not use this folder"
            )


def verify_files(folder: Path, manifest: Manifest, files: Iterable[ShardFile]) -> None:
    """Compare the checksums of `files` (all, or one rank's share) with the manifest.

    Raises:
        InputError: a file is missing or its bytes changed.
    """
    for file in files:
        path = Path(folder) / file.name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); shard again") from error
        if found != file.sha256:
            raise InputError(
                f"{path} is corrupted: its SHA-256 is {found[:12]}…, the manifest has "
                f"{file.sha256[:12]}…; delete the folder and shard again, or copy it again"
            )


class ShardReader:
    """Rows of one split, in any order, through memory maps that open when first needed.

    Survives fork and pickling: only names and sizes travel.

    Raises:
        InputError: no rows of that split, or a file that does not hold what the manifest says.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = read_manifest(folder)
        self.folder = Path(folder)
        self.split = split
        self.seq_length = manifest.seq_length
        self._dtype = token_dtype(manifest.vocab_size)
        self._files = manifest.of_split(split)
        self._starts = np.cumsum([0] + [file.rows for file in self._files])
        self._maps: dict[int, np.memmap[Any, Any]] = {}
        if not self._files:
            raise InputError(
                f"{folder} has no {split} rows; shard a corpus of two documents or more "
                "with --validation_fraction above 0"
            )

    @property
    def rows(self) -> int:
        """The number of rows of the split."""
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows numbered `rows` (n,) in [0, self.rows): int64 (n, seq_length).

        Rows that follow one another, in whatever order they are asked for, are read ahead.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"row numbers must lie in [0, {self.rows})")
        out = np.empty((len(rows), self.seq_length), dtype=np.int64)
        order = np.argsort(rows)  # each shard once, its pages in sequence
        ends = np.searchsorted(rows[order], self._starts)
        for shard in np.flatnonzero(np.diff(ends)):
            places = order[ends[shard] : ends[shard + 1]]
            first, last = rows[places[0]], rows[places[-1]]
            if len(places) > 1 and last - first == len(places) - 1:
                self.expect(np.array([first]), len(places))
            # The base class: indexing a memmap itself costs more than a small read.
            out[places] = np.asarray(self._map(int(shard)))[rows[places] - self._starts[shard]]
        return out

    def expect(self, firsts: np.ndarray, count: int) -> None:
        """Let the kernel read `count` rows from each of `firsts` (n,) on ahead of their use.

        A hint: nothing waits, and of rows that go on in another shard only the first part is read.
        """
        for shard, first in zip(*self._places(firsts), strict=True):
            mapped = self._map(int(shard))
            row_bytes = mapped.strides[0]
            start = mapped.offset % mmap.ALLOCATIONGRANULARITY + int(first) * row_bytes
            aligned = start - start % mmap.PAGESIZE
            end = min(start + count * row_bytes, len(mapped._mmap))  # type: ignore[attr-defined]
            mapped._mmap.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)  # type: ignore[attr-defined]

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row inside it."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        return shards, rows - self._starts[shards]

    def _map(self, shard: int) -> "np.memmap[Any, Any]":
        if shard not in self._maps:
            file = self._files[shard]
            shape = (file.rows, self.seq_length)
            _allow_open_files(len(self._files))
            self._maps[shard] = _map_dataset(self.folder / file.name, shape, self._dtype)
        return self._maps[shard]


def _allow_open_files(shards: int) -> None:
    """Raise the process's own limit as far as it may: a memory map holds its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + 512  # both splits, and what else the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _map_dataset(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> "np.memmap[Any, Any]":
    """A read-only map of the dataset's bytes (HDF5 itself only tells where they start)."""
    try:
        with h5py.File(path, "r") as file:
            dataset = file[DATASET]
            found, offset = (dataset.shape, dataset.dtype), dataset.id.get_offset()
        if found != (shape, dtype) or offset is None:
            raise InputError(
                f"{path} holds {found}, the manifest says {(shape, dtype)}; shard again"
            )
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        # Else the kernel reads up to megabytes around every row; `expect` says what will be used.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return mapped
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); check it with data_prep/shard.py --verify"
        ) from error
