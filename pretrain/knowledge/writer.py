"""Runs the teacher over rows and writes its knowledge, file by file, shared among ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from tqdm.auto import tqdm

from data_prep.shard_format import TRAIN, VALIDATION, ShardReader
from potstill.console import progress, say
from potstill.errors import PotstillError
from potstill.files import remove_leftovers, sha256_of, write_bytes, write_json
from pretrain.agreement import from_main_rank
from pretrain.attention import choose_attention
from pretrain.batches import VALIDATION_EPOCH, Batch, make_batch
from pretrain.knowledge.entries import Entry, record_type
from pretrain.knowledge.format import (
    IDENTITY,
    MANIFEST,
    Contents,
    KnowledgeFile,
    Part,
    file_image,
    is_sealed,
    parts_of,
    write_manifest,
)
from pretrain.knowledge.job import Job, identity_of
from pretrain.masking import Masking, shard_masking
from pretrain.run_folder import check_writable, hold_folder, holds
from pretrain.teacher import Teacher


@dataclass(frozen=True)
class Rows:
    """The batches of slots: which row and copy a slot is, masked as training will mask it."""

    contents: Contents
    readers: dict[str, ShardReader]
    masking: Masking
    pad_id: int

    def batches(self, part: Part) -> Iterator[Batch]:
        """Micro-batches of a part's slots, in order."""
        size = self.contents.micro_batch
        for start in range(part.slots.start, part.slots.stop, size):
            slots = np.arange(start, min(start + size, part.slots.stop), dtype=np.int64)
            copies, rows = np.divmod(slots, self.contents.rows[part.split])
            epochs = np.full_like(slots, VALIDATION_EPOCH) if part.split == VALIDATION else copies
            ids = self.readers[part.split].read(rows)
            yield make_batch(ids, epochs, rows, self.masking, self.pad_id)


def rows_of(job: Job) -> Rows:
    """The rows that a job stores."""
    folder, contents = Path(str(job.config.data)), job.contents
    return Rows(
        contents,
        {split: ShardReader(folder, split) for split in (TRAIN, VALIDATION)},
        shard_masking(folder, contents.mlm_probability, contents.seed, contents.mask_whole_words),
        job.manifest.special_ids["pad"],
    )


def live_teacher(job: Job, device: torch.device) -> Teacher:
    """The teacher on its device, giving what the entries are made of."""
    return Teacher(job.teacher, job.wanted, choose_attention("auto", device), device, job.dtype)


def records_of(
    entries: tuple[Entry, ...], teacher: Teacher, batch: Batch, device: torch.device
) -> NDArray[Any]:
    """The records (B,) of a batch's rows.

    Raises:
        InputError: values that the precision cannot hold.
    """
    on_device = batch.to(device)
    features = teacher.features(on_device)
    records = np.zeros(len(batch.input_ids), record_type(entries))
    for entry in entries:
        for name, values in entry.encode(features, on_device).items():
            records[name] = values
    return records


def is_stored(job: Job) -> bool:
    """Whether the output folder holds this very knowledge, whole.

    Raises:
        InputError: it holds another one, or something else, or cannot be written.
    """
    folder = job.config.folder
    identity = identity_of(job.contents)
    begun = holds(folder / IDENTITY, identity, "knowledge")
    check_writable(folder, folder)
    return begun and (folder / MANIFEST).is_file()


def store(job: Job, device: torch.device) -> None:
    """Write all files that are not whole yet, then the manifest; all ranks call it.

    Raises:
        InputError: the teacher's values do not fit the precision, or another process writes there.
        OSError: the disk is full; the files that are whole stay.
    """
    folder = job.config.folder
    from_main_rank(lambda: _begin(job))
    parts = parts_of(job.contents)
    missing = _missing(folder, parts)
    if len(missing) < len(parts):
        say(f"resume     {len(parts) - len(missing)} of {len(parts)} files are whole")
    teacher, rows = live_teacher(job, device), rows_of(job)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = sum(len(part.slots) for part in missing[rank::ranks])
    with progress(total=total, desc="storing", unit=" rows") as bar:
        for first in range(0, len(missing), ranks):
            with _together():
                for part in missing[first : first + ranks][rank : rank + 1]:
                    _write(job, part, rows, teacher, device, bar)
    files = _described(folder, parts)
    from_main_rank(lambda: write_manifest(folder, job.contents, files))


def _write(
    job: Job, part: Part, rows: Rows, teacher: Teacher, device: torch.device, bar: "tqdm[Any]"
) -> None:
    records, done = np.empty(len(part.slots), record_type(job.entries)), 0
    for batch in rows.batches(part):
        made = records_of(job.entries, teacher, batch, device)
        records[done : done + len(made)] = made
        done += len(made)
        bar.update(len(made))
    write_bytes(job.config.folder / part.name, file_image(records, job.contents.compression))


@contextmanager
def _together() -> Iterator[None]:
    """A block that ends on every rank before any goes on; what one rank meets, all raise.

    Else the others would wait for it without an end, and rank 0 could not tell what it was.
    """
    fault: Exception | None = None
    try:
        yield
    except (PotstillError, OSError) as error:
        fault = error
    faults: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for met in faults:
        if met is not None:
            raise met


def _begin(job: Job) -> None:
    """Take the folder, and write whose knowledge it will hold."""
    folder = job.config.folder
    hold_folder(folder)
    remove_leftovers(folder)
    identity = identity_of(job.contents)
    if not holds(folder / IDENTITY, identity, "knowledge"):  # asked again, under the lock
        write_json(folder / IDENTITY, {"identity": identity})


def _missing(folder: Path, parts: list[Part]) -> list[Part]:
    """The files that are not whole; ranks share the look, each reading its files."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = range(len(parts))[rank::ranks]
    looked = progress(mine, desc="looking for whole files", unit=" files", delay=5.0)
    own = [(number, is_sealed(folder / parts[number].name)) for number in looked]
    found: list[list[tuple[int, bool]]] = [[]] * ranks
    dist.all_gather_object(found, own)
    whole = {number for share in found for number, sealed in share if sealed}
    return [part for number, part in enumerate(parts) if number not in whole]


def _described(folder: Path, parts: list[Part]) -> list[KnowledgeFile]:
    """All files with their checksums; ranks share the reading. Waits for every rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    dist.barrier()
    written = progress(parts[rank::ranks], desc="checksums", unit=" files", delay=5.0)
    own = {part.name: sha256_of(folder / part.name) for part in written}
    found: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(found, own)
    sums = {name: digest for share in found for name, digest in share.items()}
    return [KnowledgeFile(p.name, p.split, len(p.slots), sums[p.name]) for p in parts]
