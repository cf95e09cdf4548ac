"""Shards of academic-budget BERT's and NVIDIA's scripts become ours: unmasked, once each.

Those scripts mask before training and repeat every row with other masks. Their HDF5 files hold, for
rows `[CLS] … [SEP] … [SEP] [PAD] …` of one length: `input_ids`, `input_mask`, `masked_lm_positions`
and `masked_lm_ids` (0 where unused), and sometimes `segment_ids` and `next_sentence_labels`.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.corpus import Source, is_text, visible_files
from data_prep.journal import Journal
from data_prep.readers import ReadOptions
from data_prep.row_maps import own_dataset
from data_prep.shard_format import TRAIN, VALIDATION, Manifest, ShardFile, token_dtype
from data_prep.sharding import Sharder, ShardPlan
from potstill.console import progress
from potstill.errors import InputError

KIND = ".hdf5"
SUFFIXES = (".hdf5", ".h5")
DATASETS = ("input_ids", "input_mask", "masked_lm_positions", "masked_lm_ids")
# What h5py raises for bytes that HDF5 cannot make sense of.
DAMAGED = (OSError, KeyError, ValueError, RuntimeError, TypeError, MemoryError)
SLAB = 16_384  # rows read at once, about: 8 MiB of int32 at 128 tokens
LEGACY_PACKING = (
    "rows as other scripts packed them, with their masks undone; of equal rows the first; "
    "each row counts as a document"
)


def find_legacy(inputs: list[str]) -> list[Source]:
    """The HDF5 files of `--input`, files in the order given, folders sorted; none: no such files.

    Raises:
        InputError: some inputs are HDF5, and others are text, missing, or hold no HDF5 file.
    """
    inside = {
        given: visible_files(Path(given)) if Path(given).is_dir() else [Path(given)]
        for given in inputs
    }
    found = {given: [p for p in paths if p.suffix in SUFFIXES] for given, paths in inside.items()}
    sources = [Source(str(p), KIND, path=p) for given in inputs for p in found[given]]
    if not sources:
        return []
    for given, paths in inside.items():
        if not Path(given).exists():
            raise InputError(f"--input {given} does not exist; give a file or a folder")
        if others := [path for path in paths if is_text(path)]:
            raise InputError(
                f"--input {sources[0].name} is HDF5 and {others[0]} is not; shard text and older "
                "shards into folders of their own"
            )
        if not found[given]:
            raise InputError(f"--input {given} is not HDF5 and holds none; take it off the list")
    return sources


class Converter(Sharder):
    """One run over older shards: all or nothing, because equal rows are found over all of them.

    It holds 8 bytes for each different row, and one shard's rows per split.
    """

    def __init__(
        self, journal: Journal, plan: ShardPlan, sources: list[Source], tokenizer: Any
    ) -> None:
        super().__init__(journal, plan, sources, ReadOptions(), tokenizer)
        self.duplicates = 0
        self._known = np.empty(0, np.uint64)
        self._waiting: dict[str, list[NDArray[Any]]] = {TRAIN: [], VALIDATION: []}

    def check(self) -> None:
        """Look at the head of every file.

        Raises:
            InputError: as `read_slabs` does.
        """
        for source in self.sources:
            next(self._unmasked(source, least=1), None)

    def run(self, workers: int = 1, engine: str = "") -> tuple[Manifest, int, float]:
        """Convert everything; the manifest, the tokens kept, the seconds.

        Raises:
            InputError: a file that is damaged or not what it should be.
        """
        started = time.perf_counter()
        if not self.state.finished:
            with progress(unit=" rows", unit_scale=True, desc="unmasking") as bar:
                for number, source in enumerate(self.sources):
                    for rows in self._unmasked(source):
                        self._keep(number, rows)
                        bar.update(len(rows))
            if not self.state.documents:
                raise InputError(f"{self.sources[0].name} and the others have no rows; give more")
            self._write(1)
            self.state.finished = True
            self._save()
        manifest = self._complete()
        tokens = sum(size.tokens for size in manifest.splits.values())
        return manifest, tokens, time.perf_counter() - started

    def _unmasked(self, source: Source, least: int = SLAB) -> Iterator[NDArray[Any]]:
        assert source.path is not None
        for start, slab in read_slabs(source.path, self.plan.seq_length, least):
            place = f"{source.name}, rows from {start},"
            yield unmask(slab, place, self.ids, self.vocab_size)

    def _keep(self, source: int, rows: NDArray[Any]) -> None:
        """Take the rows that are new, in order, each to its split."""
        rows = rows.astype(token_dtype(self.vocab_size))
        digests, first = np.unique(row_digests(rows, self.plan.seed), return_index=True)
        places = np.searchsorted(self._known, digests)
        new = np.ones(len(digests), bool)
        inside = places < len(self._known)
        new[inside] = self._known[places[inside]] != digests[inside]
        if new.any():  # else a copy of all for nothing
            self._known = np.insert(self._known, places[new], digests[new])
        order = np.argsort(first[new])
        kept, digests = rows[first[new][order]], digests[new][order]
        held_out = digests < np.uint64(self.plan.validation_fraction * 2.0**64)
        numbers = self.state.documents + np.arange(len(kept))
        held_out[numbers == 0] = False  # each side of two rows or more has one
        held_out[numbers == 1] = self.plan.validation_fraction > 0
        self.state.documents += len(kept)
        self.state.documents_by_source[source] += len(kept)
        self.duplicates += len(rows) - len(kept)
        self._waiting[TRAIN].append(kept[~held_out])
        self._waiting[VALIDATION].append(kept[held_out])
        self._write(self.plan.rows_per_shard)

    def _write(self, least: int) -> None:
        """Write full shards while at least so many rows wait."""
        for split, parts in self._waiting.items():
            if sum(map(len, parts)) < least:
                continue
            rows = np.concatenate(parts)
            while len(rows) >= least:
                shard, rows = np.split(rows, [self.plan.rows_per_shard])
                self.journal.add_shard(self.state, split, shard)
                self.state.padding[split] += int(np.count_nonzero(shard == self.ids["pad"]))
            self._waiting[split] = [rows]

    def _manifest(self, files: list[ShardFile], tokenizer_files: list[ShardFile]) -> Manifest:
        return replace(super()._manifest(files, tokenizer_files), packing=LEGACY_PACKING)


def row_digests(rows: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """A keyed 64-bit BLAKE2b digest of each row (n, L).

    Of n different rows, n^2 / 2^65 are expected to share one with another: 3e-4 of 10^8 rows.
    """
    key = seed.to_bytes(8, "little")
    digests = (hashlib.blake2b(row, digest_size=8, key=key).digest() for row in rows)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def read_slabs(
    path: Path, seq_length: int, least: int
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """The four datasets, about `least` rows at a time, with the number of the first row.

    Slabs end where the compressed chunks of `input_ids` end, so that each of these is decompressed
    once; chunks of the other datasets that lie across such an end are decompressed again. A slab
    has at least one chunk: a file that is a single chunk comes as a whole, whatever its size.

    Raises:
        InputError: no HDF5 file, a dataset missing, of another length or kind, or damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            datasets = _checked(path, file, seq_length)
            chunk = (datasets["input_ids"].chunks or (1,))[0]
            slab = chunk * max(1, least // chunk)
            for start in range(0, len(datasets["input_ids"]), slab):
                yield start, {name: data[start : start + slab] for name, data in datasets.items()}
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no whole HDF5 file ({reason}); fetch it again") from error


def _checked(path: Path, file: Any, seq_length: int) -> dict[str, Any]:
    datasets = {name: own_dataset(path, file, name) for name in DATASETS}
    missing = [name for name, data in datasets.items() if data is None]
    if missing:
        raise InputError(
            f"{path} has no dataset {', '.join(missing)}; wanted are shards of academic-budget "
            f"BERT's or NVIDIA's scripts, with {', '.join(DATASETS)}"
        )
    for name, data in datasets.items():
        if data.ndim != 2 or data.dtype.kind not in "iub" or len(data) != len(file["input_ids"]):
            raise InputError(
                f"{path}: {name} is {data.dtype} {data.shape}; it must have whole numbers and a "
                "row for each of input_ids; make the file again"
            )
    for name in ("input_ids", "input_mask"):
        if datasets[name].shape[1] != seq_length:
            raise InputError(
                f"{path}: {name} has rows of {datasets[name].shape[1]} tokens, and --seq_length is "
                f"{seq_length}; give --seq_length {datasets[name].shape[1]}"
            )
    if datasets["masked_lm_positions"].shape != datasets["masked_lm_ids"].shape:
        raise InputError(
            f"{path}: masked_lm_positions and masked_lm_ids differ in shape; make the file again"
        )
    return datasets


def unmask(
    slab: dict[str, NDArray[Any]], place: str, ids: dict[str, int], vocab_size: int
) -> NDArray[Any]:
    """The rows (n, L) before they were masked, checked against the tokenizer.

    Args:
        slab: the four datasets' rows. place: where they stand, for messages. ids: the special ones.

    Raises:
        InputError: they were made with another tokenizer, or are damaged.
    """
    rows, mask = slab["input_ids"].copy(), slab["input_mask"] == 1
    if (slab["input_mask"][~mask] != 0).any():
        raise InputError(f"{place} have an input_mask that is neither 0 nor 1; make the file again")
    row, slot = np.nonzero(slab["masked_lm_positions"])  # [CLS] at 0 is never masked: 0 is unused
    column = slab["masked_lm_positions"][row, slot]
    if column.size and not (column.min() > 0 and column.max() < rows.shape[1]):
        raise InputError(f"{place} masked_lm_positions lie outside the row; make the file again")
    hidden = rows[row, column] == ids["mask"]
    rows[row, column] = slab["masked_lm_ids"][row, slot]
    other = "give the --tokenizer that the file was made with"
    if column.size >= 100 and hidden.mean() < 0.5:  # 80 % in BERT's recipe
        raise InputError(
            f"{place} have the tokenizer's mask id {ids['mask']} at {hidden.mean():.0%} of the "
            f"masked positions; {other}"
        )
    if rows.size and not (rows.min() >= 0 and rows.max() < vocab_size):
        raise InputError(
            f"{place} hold ids from {rows.min()} to {rows.max()}, and the tokenizer has "
            f"{vocab_size}; {other}"
        )
    if (rows[:, 0] != ids["cls"]).any():
        found = rows[:, 0][rows[:, 0] != ids["cls"]][0]
        raise InputError(f"{place} begin with {found}, not with [CLS], {ids['cls']}; {other}")
    if ((rows != ids["pad"]) != mask).any() or (mask[:, 1:] > mask[:, :-1]).any():
        raise InputError(
            f"{place} have padding that input_mask does not tell, or in the middle (the "
            f"tokenizer's pad id is {ids['pad']}); {other}"
        )
    return rows
