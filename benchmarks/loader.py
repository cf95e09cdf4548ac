"""How fast do rows come, masked, from the shards to the training loop?

    python benchmarks/loader.py --json benchmarks/results/loader-cpu.json

Rows of 128 real tokens: a corpus is sharded by the real program and repeated to `--rows` rows in a
temporary folder (1 GiB at the default). Measured in turns, each for a part of a second, as
micro-batches of several sizes: our loader in process and with 1 and 2 workers, with and without
masks, and with whole words. Beside it, in process, what others use: Hugging Face's collator on rows
that are in memory; a gzip HDF5 file as NVIDIA's data set class takes it, loaded as a whole and then
indexed, with and without the time to load it; and single random rows of that file, which those
scripts avoid. Then the conversion of that file, and the order of rows on a cold page cache: rows/s
and bytes read from disk over one mixing window, shuffled blocks against single random rows, in
turns; what came from memory all the same (a file system in memory, pages in use) is marked.

About 5 minutes on two cores. Medians with quartiles. What runs in this process alone is measured
in its CPU time, which other programs hardly touch; workers, conversion and disk by the wall clock.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from common import DATA, machine, quartiles, write_report
from common import shard as shard_corpus
from torch.utils.data import DataLoader, Dataset

from data_prep.shard import parse
from data_prep.shard import shard as run_sharder
from data_prep.shard_format import (
    TRAIN,
    VALIDATION,
    ShardFile,
    ShardReader,
    SplitSize,
    read_manifest,
    shard_image,
    token_dtype,
    write_manifest,
)
from data_prep.tokenization import load_tokenizer
from potstill.console import program, progress
from potstill.errors import InputError
from potstill.files import sha256_of, write_bytes
from pretrain.batches import Slices, TrainingBatches, training_batches
from pretrain.masking import Masking, shard_masking
from pretrain.order import BLOCK, WINDOW, Order

OLDER_DATASETS = (
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
)
SHARD_ROWS, OLDER_ROWS, SLOTS = 65_536, 32_768, 20
OURS, IN_PROCESS = "ours", "in process"
READY = 8192  # rows, more than two workers have ready
COLD_TURNS = 3
NOT_COLD = " (NOT cold: the rows came from memory)"
Take = Callable[[], int]
"""Takes one batch and says how many rows it has."""


@dataclass(frozen=True)
class Case:
    """A row of the table: whose loader, where it runs, what it does, rows of a batch."""

    loader: str
    where: str
    masks: str
    batch: int


def repeated(source: Path, folder: Path, rows: int) -> Path:
    """Shards of `rows` training rows: the full ones of `source` over and over."""
    manifest, reader = read_manifest(source), ShardReader(source, TRAIN)
    dtype, files = token_dtype(manifest.vocab_size), []
    folder.mkdir()
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    for number, start in enumerate(progress(range(0, rows, SHARD_ROWS), desc="writing rows")):
        count = min(SHARD_ROWS, rows - start)
        taken = reader.read(np.arange(start, start + count) % (reader.rows - 1)).astype(dtype)
        path = folder / f"train-{number:05d}.h5"
        write_bytes(path, shard_image(taken))
        files.append(ShardFile(path.name, TRAIN, count, sha256_of(path)))
    size = SplitSize(rows, rows * reader.seq_length, 0)
    nothing = SplitSize(0, 0, 0)
    splits = {TRAIN: size, VALIDATION: nothing}
    write_manifest(folder, replace(manifest, files=files, splits=splits))
    return folder


def bytes_per_token(folder: Path) -> float:
    """Of the shards and their manifest, for each token that is not padding."""
    manifest = read_manifest(folder)
    names = [file.name for file in manifest.files] + ["manifest.json"]
    tokens = sum(size.tokens for size in manifest.splits.values())
    return sum((folder / name).stat().st_size for name in names) / tokens


def older_file(source: Path, path: Path, rows: int) -> Path:
    """The rows as other scripts write them: masked once, gzip, automatic chunks."""
    masking, reader = shard_masking(source, 0.15, seed=0), ShardReader(source, TRAIN)
    numbers = np.arange(min(rows, reader.rows))
    ids = reader.read(numbers)
    seen, chosen = masking(ids, np.zeros_like(numbers), numbers)
    positions = np.zeros((len(ids), SLOTS), np.int32)
    labels = np.zeros((len(ids), SLOTS), np.int32)
    row, column = np.divmod(chosen, ids.shape[1])
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    positions[row, slot], labels[row, slot] = column, ids[row, column]
    pad = read_manifest(source).special_ids["pad"]
    datasets = {
        "input_ids": seen.astype(np.int32),
        "input_mask": (ids != pad).astype(np.int8),
        "segment_ids": np.zeros(ids.shape, np.int8),
        "masked_lm_positions": positions,
        "masked_lm_ids": labels,
    }
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values, compression="gzip")
    return path


def our_loader(folder: Path, masking: Masking, batch: int, workers: int) -> Take:
    """Micro-batches of the trainer's own loader."""
    pad = read_manifest(folder).special_ids["pad"]
    slices = Slices(batch, 1, 0, 1)
    batches = TrainingBatches(ShardReader(folder, TRAIN), masking, pad, slices, seed=0)
    loader = training_batches(batches, 0, workers, pin=False)
    return lambda: len(next(loader).input_ids)


def collator(source: Path, batch: int) -> Take:
    """Hugging Face's masking on lists of rows, as its Trainer calls it; nothing is read."""
    from transformers import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(load_tokenizer(source / "tokenizer"))
    reader, draw = ShardReader(source, TRAIN), np.random.default_rng(0)
    ids = reader.read(np.arange(min(2048, reader.rows))).tolist()
    rows = [{"input_ids": row} for row in ids]
    return lambda: len(collate([rows[n] for n in draw.integers(0, len(rows), batch)])["labels"])


class WholeFile(Dataset[tuple[torch.Tensor, ...]]):
    """An older file in memory, a row an item: what NVIDIA's data set class does with it."""

    def __init__(self, path: Path) -> None:
        with h5py.File(path, "r") as file:
            self._arrays = [file[name][:] for name in OLDER_DATASETS]

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        """Ids, mask, segments and labels, -1 where nothing was masked: int64 (L,) each."""
        row = [torch.from_numpy(array[number].astype(np.int64)) for array in self._arrays]
        ids, mask, segments, positions, masked = row
        used = int(positions.count_nonzero())
        labels = torch.full_like(ids, -1)
        labels[positions[:used]] = masked[:used]
        return ids, mask, segments, labels


def whole_file(path: Path, batch: int) -> Take:
    """Micro-batches of a file that is in memory already."""
    loader = DataLoader(WholeFile(path), batch, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: len(next(batches)[0])


def loaded_file(path: Path, batch: int) -> Take:
    """Loads the file and gives every row once, all in one call: each file's share of an epoch."""
    return lambda: sum(len(one[0]) for one in DataLoader(WholeFile(path), batch, shuffle=True))


def gzip_rows(path: Path, batch: int) -> Take:
    """Single random rows of all datasets, straight from the compressed file."""
    file = h5py.File(path, "r")
    datasets, draw = list(file.values()), np.random.default_rng(0)

    def take() -> int:
        for number in draw.integers(0, len(datasets[0]), batch):
            for dataset in datasets:
                torch.from_numpy(dataset[number].astype(np.int64))
        return batch

    return take


def cases(
    source: Path, folder: Path, older: Path, batches: list[int]
) -> Iterator[tuple[Case, Callable[[], Take]]]:
    """Every row of the table, with what makes its loader."""
    masking = shard_masking(folder, 0.15, seed=0)
    kinds = {
        "15 % tokens": masking,
        "none": replace(masking, probability=0.0),
        "15 % whole words": shard_masking(folder, 0.15, seed=0, whole_words=True),
    }
    for batch in batches:
        for masks, kind in kinds.items():
            own = partial(our_loader, folder, kind, batch, 0)
            yield Case(OURS, IN_PROCESS, masks, batch), own
        for workers in (1, 2):
            own = partial(our_loader, folder, masking, batch, workers)
            yield Case(OURS, f"{workers} worker(s)", "15 % tokens", batch), own
    largest = max(batches)
    hugging_face = partial(collator, source, largest)
    yield Case("HF collator", IN_PROCESS, "15 % tokens", largest), hugging_face
    for name, take in (
        ("gzip HDF5, whole file in memory, as NVIDIA's", whole_file),
        ("the same, the file's loading included", loaded_file),
        ("gzip HDF5, random rows of the file (not how those scripts read)", gzip_rows),
    ):
        yield Case(name, IN_PROCESS, "stored", 32), partial(take, older, 32)


def rate(case: Case, take: Take, seconds: float) -> float:
    """Rows/s over about so many seconds, what was ready before left out."""
    ready = READY if case.loader == OURS else 1
    while ready > 0:
        ready -= take()
    clock = time.process_time if case.where == IN_PROCESS else time.perf_counter
    rows, start = 0, clock()
    while (passed := clock() - start) < seconds or not rows:
        rows += take()
    return rows / passed


def measure(
    made: list[tuple[Case, Callable[[], Take]]], turns: int, seconds: float
) -> list[dict[str, Any]]:
    """The cases in turns; a loader is made anew in each, so that no worker runs beside others."""
    rates: dict[Case, list[float]] = {case: [] for case, _ in made}
    with progress(total=turns * len(made), desc="loading") as bar:
        for _ in range(turns):
            for case, make in made:
                rates[case].append(rate(case, make(), seconds))
                bar.update()
    return [vars(case) | {"rows_per_second": quartiles(found)} for case, found in rates.items()]


def conversion(source: Path, older: Path, folder: Path, turns: int) -> dict[str, Any]:
    """Rows/s from the older file to our shards, by the real program's own function."""
    rates = []
    for turn in range(turns):
        command = ["--input", str(older), "--tokenizer", str(source / "tokenizer")]
        command += ["--output", str(folder / f"converted-{turn}")]
        start = time.perf_counter()
        run_sharder(parse(command))
        with h5py.File(older) as file:
            rates.append(len(file["input_ids"]) / (time.perf_counter() - start))
    case = Case(OURS, "conversion of gzip HDF5", "undone", OLDER_ROWS)
    return vars(case) | {"rows_per_second": quartiles(rates)}


def cold(folder: Path) -> list[dict[str, Any]]:
    """Shuffled blocks and single random rows, in turns."""
    orders = {
        f"blocks of {BLOCK}, {WINDOW:,} mixed": True,
        "single random rows": False,
    }
    runs = [
        {name: cold_run(folder, blocks) for name, blocks in orders.items()}
        for _ in range(COLD_TURNS)
    ]
    return [
        {
            "order": name,
            "rows_per_second": quartiles(turn[name]["rows_per_second"] for turn in runs),
            "bytes_read_per_row": quartiles(turn[name]["bytes_read_per_row"] for turn in runs),
            "rows": runs[0][name]["rows"],
            "from_disk": all(turn[name]["from_disk"] for turn in runs),
        }
        for name in orders
    ]


def cold_run(folder: Path, blocks: bool, batch: int = 1024) -> dict[str, Any]:
    """Reading the rows of one window's length, from a page cache without these shards.

    `from_disk` is false where less than half of these rows' bytes was read from a disk: in a file
    system in memory, or where pages stayed because another process has them mapped.
    """
    reader = ShardReader(folder, TRAIN)
    count = min(reader.rows, BLOCK * WINDOW)
    order = Order(reader.rows, 0, reader.expect)
    scattered = np.random.default_rng(0).permutation(reader.rows)[:count]
    for path in folder.glob("*.h5"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read, start = disk_bytes(), time.perf_counter()
    for first in range(0, count, batch):
        places = np.arange(first, min(first + batch, count))
        reader.read(order(places)[1] if blocks else scattered[places])
    seconds, read = time.perf_counter() - start, disk_bytes() - read
    row_bytes = reader.seq_length * token_dtype(read_manifest(folder).vocab_size).itemsize
    return {
        "rows": count,
        "rows_per_second": count / seconds,
        "bytes_read_per_row": read / count,
        "from_disk": read >= 0.5 * count * row_bytes,
    }


def disk_bytes() -> int:
    """Bytes that this process has made the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def told(found: dict[str, float]) -> str:
    """Two cells: the median, and the quartiles."""
    return f"{found['median']:,.0f} | {found['low']:,.0f}–{found['high']:,.0f}"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| loader | where | masks | rows a batch | rows/s | quartiles |",
        "|---|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['loader']} | {r['where']} | {r['masks']} | {r['batch']:,} "
        f"| {told(r['rows_per_second'])} |"
        for r in report["rows"]
    ]
    lines += [
        "",
        "| order, on a cold page cache | rows/s | quartiles | bytes read per row | quartiles |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['order']}{'' if r['from_disk'] else NOT_COLD} "
        f"| {told(r['rows_per_second'])} | {told(r['bytes_read_per_row'])} |"
        for r in report["cold"]
    ]
    held = f"{report['bytes_per_token']:.3f} bytes per token"
    return "\n".join([*lines, "", f"On disk, manifest included: {held} of the sharded corpus."])


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, default=DATA / "corpus" / "books-00000-of-00001.parquet")
    add("--tokenizer", type=Path, default=DATA / "vocab" / "bert-base-uncased")
    add("--rows", type=int, default=2**22, help="training rows, repeated (default: 4,194,304)")
    add("--batches", type=int, nargs="+", default=[32, 256, 1024], help="rows of a micro-batch")
    add("--turns", type=int, default=5, help="2 or more, because one has no spread (default: 5)")
    add("--seconds", type=float, default=1.0, help="of one measurement")
    add("--json", type=Path, help="write the numbers there, and the table beside it as .md")
    options = parser.parse_args()
    if options.turns < 2:
        raise InputError(f"--turns is {options.turns}, and one turn has no spread; give 2 or more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = shard_corpus(options.corpus, options.tokenizer, folder / "source")
        older = older_file(source, folder / "older.hdf5", OLDER_ROWS)
        rows = repeated(source, folder / "rows", options.rows)
        made = list(cases(source, rows, older, options.batches))
        found = measure(made, options.turns, options.seconds)
        report = {
            "machine": machine(torch.device("cpu")),
            "settings": {n: getattr(options, n) for n in ("rows", "turns", "seconds")},
            "bytes_per_token": bytes_per_token(source),
            "rows": [*found, conversion(source, older, folder, options.turns)],
            "cold": cold(rows),
        }
    if options.json:
        write_report(options.json, report, table(report) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
