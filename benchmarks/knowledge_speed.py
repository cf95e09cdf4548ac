"""How much faster does a student learn from stored knowledge than from a live teacher?

    python benchmarks/knowledge_speed.py --data SHARDS

Steps of the real trainer (`pretrain.loop`, DeepSpeed's engine on one rank, bfloat16) with a live
teacher, and from knowledge that the real program stored, whole and cut. Rows of 128 tokens come in
training's random order from the real loader, in groups of the steps of one turn, so that every time
holds all of its reading (from files in the page cache). All steps of a case take turns in one
process, each turn beginning with another one; ratios are taken turn by turn. Teachers of 12x768 are
random, and so is what they know: this is about time only. That of 6x384 is the packaged real one,
which has no MLM head. A step is four micro-batches of 32 rows, and for two objectives also one.

Then the reader alone: rows/s of `KnowledgeReader.attach` in that order, plain and under zstd, over
the rows/s at which the fastest student takes the same knowledge.

On a CPU one thread works, and the clock is the process's own CPU time. Where there is a GPU it
works there; give it larger micro-batches (`--batch 512 --rows 4096`). Writes
`results/knowledge-speed-DEVICE.{json,md}`.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_step import Pair
from common import (
    CLOCKS,
    RESULTS,
    clock_name,
    machine,
    packaged_teacher,
    quartiles,
    seconds,
    write_report,
)
from knowledge_cases import (
    RANDOM,
    REAL,
    WAYS,
    WHOLE,
    Case,
    Places,
    Stored,
    Trainer,
    random_teacher,
)
from knowledge_store import bytes_per_token, compressed, open_reader
from torch import distributed as dist

from data_prep.shard_format import TRAIN, ShardReader, read_manifest
from potstill.console import program, progress
from potstill.errors import InputError, PotstillError
from pretrain.batches import Batch, make_batches
from pretrain.engine import start_ranks
from pretrain.knowledge.reader import KnowledgeReader
from pretrain.masking import shard_masking
from pretrain.order import Order

LIVE, WARM_UP = "live teacher", 1  # turns
ALSO_ONE = ("hid-seq", "att-mse")  # also with one micro-batch a step
AGREEMENT = 1e-3
"""How far the first losses of the live teacher and of its whole knowledge may be apart."""


def cases(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Those of `--only`; teachers are made when they are needed."""
    random = folder / "random"
    for text in RANDOM if options.tiny else (*RANDOM, REAL):
        pair = Pair((2, 48), (1, 24), 4) if options.tiny else Pair.parse(text)
        for objective in WAYS:
            real = text == REAL
            if options.only not in f"{objective} {text}" or (real and objective == "vanilla-kd"):
                continue
            if not real and not random.exists():
                random_teacher(pair, options.data, random)
            teacher = packaged_teacher() if real else random
            yield Case(pair, objective, teacher, "real 6x384" if real else "random 12x768")


def measure(
    case: Case, places: Places, options: argparse.Namespace, accumulation: int
) -> dict[str, Any]:
    """All steps of a case in turns."""
    steps = max(1, options.steps // accumulation)
    folders = {way.name: places.knowledge(case, way) for way in WAYS[case.objective]}
    sources = {LIVE: None, **folders}
    trainers = {n: Trainer(case, places, own, steps, accumulation) for n, own in sources.items()}
    losses = {name: first_loss(trainer) for name, trainer in trainers.items()}
    if not abs(losses[WHOLE.name] / losses[LIVE] - 1) < AGREEMENT:
        raise PotstillError(f"{case.name}: knowledge and teacher do not teach the same: {losses}")
    for trainer in trainers.values():
        for _ in range(WARM_UP):
            trainer.turn()
    turns = []
    for number in progress(range(options.turns), desc=f"{case.name} x{accumulation}", unit="turn"):
        turns.append(take_turn(trainers, number, places.device))
    rows = steps * accumulation * places.rows
    ways = []
    for name, folder in folders.items():
        ways.append(
            {
                "way": name,
                "bytes_per_token": bytes_per_token(folder),
                "same_loss": losses[name] == losses[LIVE],
                "ms": quartiles((turn[name] / steps for turn in turns), 1e3),
                "rows_per_second": rows / statistics.median(turn[name] for turn in turns),
                "ratio": quartiles(turn[LIVE] / turn[name] for turn in turns),
            }
        )
    return {
        "teacher": case.title,
        "pair": str(case.pair),
        "objective": case.objective,
        "accumulation": accumulation,
        "steps_a_turn": steps,
        "live_ms": quartiles((turn[LIVE] / steps for turn in turns), 1e3),
        "ways": ways,
    }


def first_loss(trainer: Trainer) -> float:
    """The loss at the end of a trainer's first turn."""
    trainer.turn()
    return trainer.loss()


def take_turn(trainers: dict[str, Trainer], turn: int, device: torch.device) -> dict[str, float]:
    """Seconds of each trainer's turn, in an order that goes on by one from turn to turn."""
    names = list(trainers)
    first = turn % len(names)
    order, clock = names[first:] + names[:first], clock_name(device)
    return {name: seconds(trainers[name].turn, device, clock) for name in order}


def read(
    places: Places, rows: Sequence[dict[str, Any]], turns: int, least: float
) -> list[dict[str, Any]]:
    """The reader's rates, plain and under zstd in turns, over those of the fastest training."""
    batches, found = shuffled(places), []
    for key, folder in places.stored.items():
        packed = compressed(folder, folder.with_name(f"{folder.name}-zstd"))
        readers = {"none": open_reader(folder), "zstd": open_reader(packed)}
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(1 + turns):  # the first one opens the files
            for name, reader in readers.items():
                rates[name].append(attach_rate(reader, batches, least, places.device))
        taken = max(w["rows_per_second"] for row in rows for w in row["ways"] if is_of(row, w, key))
        for name, own in rates.items():
            rate = quartiles(own[1:])
            size = bytes_per_token(folder if name == "none" else packed)
            found.append(
                {**key._asdict(), "compression": name, "bytes_per_token": size}
                | {"rows_per_second": rate, "taken": taken, "times": rate["median"] / taken}
            )
    return found


def is_of(row: dict[str, Any], way: dict[str, Any], key: Stored) -> bool:
    """Whether a measured way learned from this knowledge."""
    return (row["teacher"], row["objective"], way["way"]) == key


def shuffled(places: Places) -> list[Batch]:
    """All training rows once, in training's order."""
    reader, masking = ShardReader(places.data, TRAIN), shard_masking(places.data, 0.15, seed=0)
    samples = np.arange(reader.rows // places.rows * places.rows, dtype=np.int64)
    epochs, rows = Order(reader.rows, 0, reader.expect)(samples)
    pad = read_manifest(places.data).special_ids["pad"]
    return make_batches(reader.read(rows), epochs, rows, masking, pad, places.rows)


def attach_rate(
    reader: KnowledgeReader, batches: Sequence[Batch], least: float, device: torch.device
) -> float:
    """Rows/s of whole passes over the batches that together take `least` seconds or more."""
    clock = CLOCKS[clock_name(device)]
    passes, start = 0, clock()
    while not passes or clock() - start < least:
        for batch in batches:
            reader.attach(batch)
        passes += 1
    return passes * sum(len(batch.input_ids) for batch in batches) / (clock() - start)


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Steps, as Markdown."""
    lines = [
        "| teacher → student | objective | knowledge | bytes a token | micro-batches a step "
        "| live, ms a step | stored, ms a step | live / stored (quartiles) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for way in row["ways"]:
            ratio = way["ratio"]
            lines.append(
                f"| {row['pair'].replace('-', ' → ')} ({row['teacher'].split()[0]}) "
                f"| {row['objective']} | {way['way']} | {way['bytes_per_token']:,.1f} "
                f"| {row['accumulation']} | {row['live_ms']['median']:.0f} "
                f"| {way['ms']['median']:.0f} | **{ratio['median']:.2f}** "
                f"({ratio['low']:.2f}–{ratio['high']:.2f}) |"
            )
    return "\n".join(lines) + "\n"


def reader_table(rows: Sequence[dict[str, Any]]) -> str:
    """The reader alone, as Markdown."""
    lines = [
        "| knowledge of | objective | what | compression | bytes a token | rows/s read "
        "| rows/s that training takes | times |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {own['teacher']} | {own['objective']} | {own['way']} | {own['compression']} "
        f"| {own['bytes_per_token']:,.1f} | {own['rows_per_second']['median']:,.0f} "
        f"| {own['taken']:,.1f} | {own['times']:,.0f} |"
        for own in rows
    ]
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> str:
    """Both tables."""
    return speed_table(report["rows"]) + "\n" + reader_table(report["reader"])


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, required=True, help="shards with BERT's vocabulary")
    add("--rows", type=int, default=256, help="training rows that are stored")
    add("--batch", type=int, default=32, help="rows of a micro-batch")
    add("--turns", type=int, default=5, help="2 or more, because one has no spread")
    add("--steps", type=int, default=2, help="micro-batches of a turn, or one step if that is more")
    add("--accumulation", type=int, default=4, help="micro-batches of a step, in the first form")
    add("--read_seconds", type=float, default=0.3, help="of one measurement of the reader")
    add("--only", default="", help="cases that have this in their names, such as 4x312")
    add("--tiny", action="store_true", help="tiny models: a test")
    add("--json", type=Path, help="figures; .md too; default: results/knowledge-speed-DEVICE.json")
    options = parser.parse_args()
    if options.turns < 2:
        raise InputError(f"--turns {options.turns} has no spread; give at least 2")
    torch.set_num_threads(1)
    device = start_ranks()
    options.json = options.json or RESULTS / f"knowledge-speed-{device.type}.json"
    settings = {n: getattr(options, n) for n in ("rows", "batch", "turns", "steps")}
    report: dict[str, Any] = {"machine": machine(device), "settings": settings}
    report |= {"rows": [], "reader": []}
    with tempfile.TemporaryDirectory() as name:
        places = Places(Path(name), options.data, options.rows, options.batch, device)
        for case in cases(options, Path(name)):
            for accumulation in (options.accumulation, 1)[: 1 + (case.objective in ALSO_ONE)]:
                report["rows"].append(measure(case, places, options, accumulation))
                write_report(options.json, report, table(report))  # what is done is kept
                gc.collect()  # engines are in cycles
        if not report["rows"]:
            raise InputError(f"--only {options.only!r} is in no case's name")
        report["reader"] = read(places, report["rows"], options.turns, options.read_seconds)
    write_report(options.json, report, table(report))
    print(table(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
