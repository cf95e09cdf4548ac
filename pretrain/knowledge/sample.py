"""A measured sample of storing knowledge, and of the training that will read it.

It stands in a temporary folder on the disk of the output while it is read back; nothing stays.
"""

import os
import tempfile
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from data_prep.shard_format import TRAIN
from potstill.files import write_bytes
from pretrain.batches import Batch
from pretrain.knowledge.entries import row_bytes
from pretrain.knowledge.format import (
    FORMAT_VERSION,
    KnowledgeFile,
    KnowledgeManifest,
    Part,
    file_image,
)
from pretrain.knowledge.job import Job
from pretrain.knowledge.reader import KnowledgeReader
from pretrain.knowledge.stopwatch import LEAST, Stopwatch
from pretrain.knowledge.trial_student import Student, time_learning
from pretrain.knowledge.writer import live_teacher, records_of, rows_of

MOST = 64  # micro-batches that are timed
MOST_BYTES = 2**28  # of the sample's records in memory
FILE_BYTES = 2**24  # up to which they are written again and again


@dataclass(frozen=True)
class Sample:
    """What was measured, mean over ranks that work at the same time; all of it for one row.

    Attributes:
        file_bytes: in a file, compressed where that is asked for.
        teacher: seconds of its forward pass, as a live teacher's.
        storing: seconds of the forward pass and of making the records.
        writing: seconds of compressing, sealing and writing them to disk.
        reading: seconds of reading them in random order, as the loader does.
        decoding: seconds of moving them to the device and making features of them.
        student: seconds of forward, backward and its share of an update, without the engine.
    """

    file_bytes: float
    teacher: float
    storing: float
    writing: float
    reading: float
    decoding: float
    student: float


def take_sample(job: Job, student: Student, device: torch.device) -> Sample:
    """Store a few rows, read them back and let a student learn from them; all ranks call it.

    Every rank takes the same rows, so that what is wrong with them ends all ranks alike.

    Raises:
        InputError: the teacher's values do not fit the precision.
        OSError: no room for the sample.
    """
    batches = _batches(job)
    dist.barrier()
    records, teacher, storing = _storing(job, batches, device)
    place = None if job.config.output is None else place_of(job.config.folder)
    with tempfile.TemporaryDirectory(prefix="knowledge-plan-", dir=place) as folder:
        dist.barrier()
        reader, file_bytes, writing = _writing(job, records, Path(folder))
        dist.barrier()
        reading = _reading(reader, batches)
        known = [reader.attach(batch) for batch in batches[: _whole(records, batches)]]
    dist.barrier()
    decoding, learning = time_learning(job, student, known, device)
    own = Sample(file_bytes, teacher, storing, writing, reading, decoding, learning)
    total = torch.tensor(astuple(own), dtype=torch.float64).to(device)
    dist.all_reduce(total)
    return Sample(*(total / dist.get_world_size()).tolist())


def _batches(job: Job) -> list[Batch]:
    """Micro-batches of the first training rows."""
    contents, size = job.contents, job.contents.micro_batch
    number = max(LEAST, min(MOST, MOST_BYTES // (size * row_bytes(job.entries))))
    rows = min(contents.rows[TRAIN], number * size)
    return list(rows_of(job).batches(Part("sample", TRAIN, range(rows))))


def place_of(folder: Path) -> Path:
    """The nearest folder of a path that is there: it tells on which disk the path will be."""
    folder = folder.resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def _storing(
    job: Job, batches: list[Batch], device: torch.device
) -> tuple[NDArray[Any], float, float]:
    """Records of the first micro-batches; seconds a row of the teacher, and of both."""
    teacher = live_teacher(job, device)
    records_of(job.entries, teacher, batches[0], device)  # the first call of anything is slow
    alone, both = Stopwatch(device), Stopwatch(device)
    records = []
    for batch in batches:
        rows = len(batch.input_ids)
        alone(rows, teacher.features, batch.to(device))
        records.append(both(rows, records_of, job.entries, teacher, batch, device))
        if both.enough:
            break
    return np.concatenate(records), alone.median, both.median


def _whole(records: NDArray[Any], batches: list[Batch]) -> int:
    """How many of the micro-batches have records."""
    return -(-len(records) // len(batches[0].input_ids))


def _writing(job: Job, records: NDArray[Any], folder: Path) -> tuple[KnowledgeReader, float, float]:
    """Write the records again and again, up to a file's usual size: reader, bytes, seconds a row.

    A file of few rows would time little but the disk's flush.
    """
    contents = job.contents
    usual = min(contents.rows_per_file, FILE_BYTES // records.itemsize)
    many, path = np.resize(records, max(len(records), usual)), folder / "sample"
    watch = Stopwatch(torch.device("cpu"))
    watch(len(many), lambda: write_bytes(path, file_image(many, contents.compression)))
    own = replace(contents, rows={**contents.rows, TRAIN: len(many)}, copies=1)
    own = replace(own, rows_per_file=len(many))
    files = [KnowledgeFile(path.name, TRAIN, len(many), "")]
    reader = KnowledgeReader(folder, KnowledgeManifest(FORMAT_VERSION, own, files), job.entries)
    return reader, path.stat().st_size / len(many), watch.median


def _reading(reader: KnowledgeReader, batches: list[Batch]) -> float:
    """Seconds a row of reading in random order, with what the loader does with a batch."""
    with suppress(OSError), open(reader.folder / "sample", "rb") as file:
        # What was just written would be read from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size, slots = len(batches[0].input_ids), reader.manifest.contents.rows[TRAIN]
    order = np.random.default_rng(0).permutation(slots - slots % size)
    watch = Stopwatch(torch.device("cpu"))
    for rows in order.reshape(-1, size):
        watch(size, reader.attach, replace(batches[0], rows=rows))
        if watch.enough:
            break
    return watch.spent / (len(watch.taken) * size)
