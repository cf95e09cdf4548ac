"""The shards on disk: HDF5 files of token rows and the manifest that describes them.

A shard holds one dataset, `input_ids` (rows, seq_length), uint16 (uint32 when the vocabulary has
more than 65,535 tokens), stored contiguously, so that rows are read by a memory map at the
dataset's place in the file. Layouts are written and read only here.
"""

import json
import mmap
import re
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_prep.row_maps import allow_open_files, map_dataset
from data_prep.typed_json import build
from potstill.console import progress
from potstill.errors import InputError
from potstill.files import read_sealed_json, sha256_of, write_sealed_json
from potstill.text import UNSPEAKABLE

FORMAT_VERSION = 2
DATASET = "input_ids"
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN, VALIDATION = "train", "validation"
MOST_ROWS = 2**48
MOST_TOKENS = 2**20  # a row: far above the positions of any encoder
_PLAIN_NAME = re.compile(rf"(?!\.{{1,2}}$)[^/\\{UNSPEAKABLE}]{{1,255}}")  # no path


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
    write_sealed_json(folder / MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder of shards.

    Raises:
        InputError: missing, not as it was written or malformed; another format version; a file
            name that is a path. A file may be a link, as in caches: its bytes are compared.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder} has no {MANIFEST}: it is no finished folder of data_prep/shard.py"
        )
    try:
        fields = read_versioned(path)
        manifest: Manifest = build(Manifest, fields, "the manifest")
        _check_files(manifest)
        _check_values(manifest)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or malformed ({error}); copy it again, or shard the corpus again "
            "into another folder"
        ) from error
    return manifest


def read_versioned(path: Path) -> dict[str, Any]:
    """Read a sealed file that tells its `format_version`.

    Raises:
        InputError: another Potstill wrote it, which is no damage.
        OSError: it cannot be read.
        ValueError: it is not as it was written.
    """
    try:
        fields = read_sealed_json(path)
    except ValueError:
        fields = _of_version_1(path)
        if not fields:
            raise
    version = fields.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise InputError(
            f"{path} is of format version {version}, and this Potstill reads {FORMAT_VERSION}; "
            "that is no damage: keep the folder for the Potstill that wrote it, and shard the "
            "corpus again into another folder"
        )
    return fields


def _of_version_1(path: Path) -> dict[str, Any]:
    """The fields of a file from before there were checksums; none if it is no such file."""
    try:
        fields = json.loads(path.read_bytes())
        return fields if fields["format_version"] == 1 and "checksum" not in fields else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError for values that no folder of shards has."""
    within = {
        "seq_length": (3, MOST_TOKENS),
        "vocab_size": (1, 2**32),
        "documents": (1, 2**63),
        "validation_fraction": (0, 1),
        "rows_per_shard": (1, 2**63),
    }
    for name, (least, most) in within.items():
        if not least <= getattr(manifest, name) <= most:
            raise ValueError(f"{name} is {getattr(manifest, name)}")
    if manifest.splits.keys() != {TRAIN, VALIDATION}:
        raise ValueError(f"splits are {sorted(manifest.splits)}")
    ids = manifest.special_ids
    if ids.keys() != {"pad", "cls", "sep", "mask"} or max(ids.values()) >= manifest.vocab_size:
        raise ValueError(f"special_ids are {ids}")
    for name, size in manifest.splits.items():
        rows = sum(file.rows for file in manifest.of_split(name))
        if rows > MOST_ROWS:
            raise ValueError(f"{name} has {rows} rows")
        if size.rows != rows or size.tokens + size.padding != rows * manifest.seq_length:
            raise ValueError(f"the rows and tokens of {name} do not add up")
    for source in manifest.sources:
        build(int, source.get("documents"), "documents of a source")
        build(str, source.get("name"), "name of a source")


def _check_files(manifest: Manifest) -> None:
    """Raises ValueError for a name that is a path, or a file not described as it must be."""
    names: set[str] = set()
    tokenizer = f"{TOKENIZER_FOLDER}/"
    lists = {
        "files": ("", manifest.files),
        "tokenizer_files": (tokenizer, manifest.tokenizer_files),
    }
    for field, (inside, files) in lists.items():
        for number, file in enumerate(files):
            place, plain = f"{field}[{number}]", file.name.removeprefix(inside)
            if not file.name.startswith(inside) or not _PLAIN_NAME.fullmatch(plain):
                raise ValueError(f"{place}.name, {file.name!r}, leads outside the folder")
            if not re.fullmatch("[0-9a-f]{64}", file.sha256):
                raise ValueError(f"{place}.sha256 is {file.sha256[:70]!r}")
            if not inside and not (file.rows > 0 and file.split in (TRAIN, VALIDATION)):
                raise ValueError(f"{place} has {file.rows} rows of {file.split!r}")
            if file.name in names:
                raise ValueError(f"{place}.name, {file.name!r}, stands there twice")
            names.add(file.name)


def damage(folder: Path, file: ShardFile) -> str | None:
    """What is wrong with a file by its checksum, for a message; None where nothing is."""
    path, mended = Path(folder) / file.name, "copy it again, or shard again into another folder"
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}); {mended}"
    if found == file.sha256:
        return None
    return (
        f"{path} is corrupted: its SHA-256 is {found[:12]}…, the manifest has "
        f"{file.sha256[:12]}…; {mended}"
    )


def verify_files(folder: Path, manifest: Manifest, files: Iterable[ShardFile]) -> None:
    """Compare the checksums of `files` (all, or one rank's share) with the manifest.

    Raises:
        InputError: a file is missing or its bytes changed.
    """
    if faults := list(damaged_files(folder, files).values()):
        others = f" (and {len(faults) - 1} more files)" if faults[1:] else ""
        raise InputError(f"{faults[0]}{others}")


def damaged_files(folder: Path, files: Iterable[ShardFile]) -> dict[str, str]:
    """What is wrong with the files that do not have their checksums, by name."""
    checked = progress(list(files), desc="checking files", unit=" files", delay=5.0)
    faults = {file.name: damage(folder, file) for file in checked}
    return {name: fault for name, fault in faults.items() if fault is not None}


class ShardReader:
    """Rows of one split, in any order, through memory maps that open when first needed.

    Survives fork and pickling: only names and sizes travel.

    Args:
        left_out: names of bad shards. In training each of their rows is replaced by one of a good
            shard, always the same one, so that all other rows keep their numbers. In validation
            they are dropped: no row is to count twice in a mean.

    Raises:
        InputError: no rows of that split, or a file that does not hold what the manifest says.
    """

    def __init__(self, folder: Path, split: str, left_out: Set[str] = frozenset()) -> None:
        manifest = read_manifest(folder)
        self.folder = Path(folder)
        self.split = split
        self.seq_length = manifest.seq_length
        self._dtype = token_dtype(manifest.vocab_size)
        files = manifest.of_split(split)
        good = [file for file in files if file.name not in left_out]
        self._files = files if split == TRAIN else good
        self._starts = np.cumsum([0] + [file.rows for file in self._files])
        self._bad = np.array([file.name in left_out for file in self._files], bool)
        self._maps: dict[int, np.memmap[Any, Any]] = {}
        if not files:
            raise InputError(
                f"{folder} has no {split} rows; shard a corpus of two documents or more "
                "with --validation_fraction above 0"
            )
        if not good:
            raise InputError(
                f"every {split} shard in {folder} is bad; copy the folder again, or shard again"
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
        rows = self._replaced(rows)
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

    def _replaced(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of rows that can be read: the n-th bad row is the n-th good one, cyclically.

        Neighbours stay neighbours, and no good row stands in much more often than another.
        """
        if not self._bad.any():
            return rows
        sizes = np.diff(self._starts)
        good_starts = np.cumsum([0, *np.where(self._bad, 0, sizes)])
        bad_starts = np.cumsum([0, *np.where(self._bad, sizes, 0)])
        shards, inside = self._places(rows)
        wanted = (bad_starts[shards] + inside) % good_starts[-1]
        found = np.searchsorted(good_starts, wanted, side="right") - 1
        return np.where(self._bad[shards], self._starts[found] + wanted - good_starts[found], rows)

    def expect(self, firsts: np.ndarray, count: int) -> None:
        """Let the kernel read `count` rows from each of `firsts` (n,) on ahead of their use.

        A hint: nothing waits, and of rows that go on in another shard only the first part is read.
        """
        for shard, first in zip(*self._places(self._replaced(firsts)), strict=True):
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
            allow_open_files(len(self._files))
            self._maps[shard] = map_dataset(self.folder / file.name, DATASET, shape, self._dtype)
        return self._maps[shard]
