"""Rows of stored knowledge, in any order, read with the batches that they belong to."""

import mmap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zstandard import ZstdDecompressor, ZstdError, frame_content_size

from data_prep.row_maps import allow_open_files
from data_prep.shard_format import TRAIN, VALIDATION
from potstill.errors import InputError
from pretrain.batches import VALIDATION_EPOCH, Batch
from pretrain.knowledge.cuts import kept_counts
from pretrain.knowledge.entries import Entry, record_type
from pretrain.knowledge.format import SEAL_BYTES, KnowledgeManifest
from pretrain.knowledge.layout import cut_of


class Place(NamedTuple):
    """A record in its file: its number there, and its bytes as they stand on disk."""

    name: str
    at: int
    content: NDArray[np.uint8]


class KnowledgeReader:
    """Reads records through memory maps that open when first needed.

    Survives fork and pickling: only names and sizes travel.
    """

    def __init__(
        self, folder: Path, manifest: KnowledgeManifest, entries: tuple[Entry, ...]
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._type = record_type(entries)
        self._packed = manifest.contents.compression == "zstd"
        self._files = {split: manifest.of_split(split) for split in (TRAIN, VALIDATION)}
        self._maps: dict[str, tuple[mmap.mmap, NDArray[np.uint8]]] = {}
        self._cut = cut_of(manifest.contents)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory."""
        return self._type.itemsize

    def attach(self, batch: Batch) -> Batch:
        """The batch with what is stored of its rows, and with the counts of what was kept."""
        assert batch.rows is not None and batch.epochs is not None, "rows of shards are numbered"
        contents = self.manifest.contents
        held_out = bool(batch.epochs[0] == VALIDATION_EPOCH)
        copies = 0 if held_out else batch.epochs % contents.copies * contents.rows[TRAIN]
        records = self.read(VALIDATION if held_out else TRAIN, batch.rows + copies)
        kept = kept_counts(batch, self._cut, contents.sep_id)._asdict()
        return replace(batch, knowledge=fields_of(records), counts={**batch.counts, **kept})

    def read(self, split: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """The records of slots (n,) of a split, in that order."""
        found = [self._find(split, slot) for slot in slots.tolist()]
        records = np.empty(len(slots), self._type)
        rows = records.view(np.uint8).reshape(len(slots), self._type.itemsize)
        for row, place in zip(rows, found, strict=True):
            row[:] = self._content(place)
        return records

    def _find(self, split: str, slot: int) -> Place:
        """Where a record stands; the kernel begins to read it, beside those asked for before.

        Cold records in random order come several times as fast so. Spans of a damaged table are
        left out.
        """
        number, at = divmod(slot, self.manifest.contents.rows_per_file)
        name, size = self._files[split][number].name, self._type.itemsize
        whole, content = self._map(name)
        start, end = at * size, (at + 1) * size
        if self._packed:
            start, end = content[8 * at : 8 * at + 16].view("<i8").tolist()
        if 0 <= start < end <= len(whole):
            aligned = start - start % mmap.PAGESIZE
            whole.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)
        return Place(name, at, content[start:end])

    def _content(self, place: Place) -> NDArray[np.uint8]:
        if not self._packed:
            return place.content
        try:
            frame = place.content.tobytes()
            if (size := frame_content_size(frame)) != self._type.itemsize:  # memory of a bad frame
                raise ValueError(f"{size} bytes in place of {self._type.itemsize}")
            return np.frombuffer(ZstdDecompressor().decompress(frame), np.uint8)
        except (ZstdError, ValueError) as error:
            raise InputError(
                f"{self.folder / place.name}: record {place.at} is damaged ({error}); copy the "
                "file again"
            ) from error

    def check_sizes(self) -> None:
        """Look whether all files are there, and large enough for what they should hold.

        Raises:
            InputError: one is not.
        """
        for file in self.manifest.files:
            path = self.folder / file.name
            try:
                size = path.stat().st_size - SEAL_BYTES
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror or error})") from error
            table = 8 * (file.records + 1)
            whole = size > table if self._packed else size == file.records * self._type.itemsize
            if not (whole and path.is_file()):
                raise InputError(
                    f"{path} does not hold {file.records} records of {self._type.itemsize} bytes; "
                    "copy it again"
                )

    def _map(self, name: str) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        """A file, and its bytes without the seal."""
        if name not in self._maps:
            allow_open_files(len(self.manifest.files))
            path = self.folder / name
            try:
                with open(path, "rb") as file:
                    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} cannot be read ({error})") from error
            whole.madvise(mmap.MADV_RANDOM)  # `_find` says what will be used
            self._maps[name] = whole, np.frombuffer(whole, np.uint8)[:-SEAL_BYTES]
        return self._maps[name]


def fields_of(records: NDArray[Any]) -> Mapping[str, Tensor]:
    """The fields of records (B,) as tensors (B, *shape) by name."""
    names = records.dtype.names or ()
    return {name: torch.from_numpy(np.ascontiguousarray(records[name])) for name in names}
