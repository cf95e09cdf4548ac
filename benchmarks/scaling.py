"""What DeepSpeed, a second rank and the exchange of gradients cost the real trainer.

    python benchmarks/scaling.py [--json benchmarks/results/scaling-cpu.json]

Runs `pretrain/run.py` through the `deepspeed` launcher on 1 and on 2 ranks, one core and one thread
each, at 16,384 tokens per optimiser step, and the same step without DeepSpeed (`bare_step.py`) on 1
core. Speeds are those of steps in the runs' metrics.jsonl, the first left out. For the formula of
scale, 1 rank also takes steps of a single micro-batch. A turn is one start
of the launcher for each number of ranks; its jobs run behind one another, in every second turn in
the opposite order. Ratios are those of a turn. ZeRO 0 to 3 of the small pair run in every turn,
the rest in the first only. Models are random, and the text is from `--corpus`.

About 8 minutes on 2 cores. `--quick`: tiny models, as the tests run it; its figures say nothing.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from bare_step import Pair, build_models
from common import DATA, RESULTS, ROOT, launch, machine, metrics, shard
from scaling_report import Case, ds_config, exchange_rows, model_inputs, speed_rows, tables
from transformers import AutoTokenizer

from potstill.console import program, progress
from potstill.errors import InputError, TrainingError
from potstill.files import write_json, write_text

SMALL, BASE, TINY = "6x384-3x384", "12x768-6x768", "2x48-1x48"
LENGTH = 128
SINGLES = 3  # times as many steps of one micro-batch, which are short
TEXT_BYTES = 3_000_000  # of corpus; 16,384 tokens a step for a few steps


def all_cases(rows: int) -> list[Case]:
    """What is measured."""
    cases = [Case(SMALL, 1, stage, always=True) for stage in (None, 0, 1, 2, 3)]
    cases += [Case(SMALL, 2, stage, always=True) for stage in (0, 1, 2, 3)]
    cases += [Case(SMALL, 1, stage, "fp32") for stage in (None, 0)] + [Case(SMALL, 2, 0, "fp32")]
    cases += [Case(BASE, 1, None), Case(BASE, 1, 1), Case(BASE, 2, 1)]
    for accumulation in (1, 16):  # beside the 4 of MICRO
        micro = rows // 2 // accumulation
        cases += [Case(SMALL, ranks, 1, micro=micro) for ranks in (1, 2)]
    cases += [Case(SMALL, 1, 1, micro=micro, single=True) for micro in (4, 16, 64)]
    for zero in (("overlap_comm", False), ("reduce_bucket_size", 1_000_000)):
        cases.append(Case(SMALL, 2, 2, zero=(zero,)))
    return cases


def quick_cases(rows: int) -> list[Case]:
    """The least that has every kind of case."""
    cases = [Case(TINY, 1, None), Case(TINY, 1, 1), Case(TINY, 2, 1)]
    return [*cases, *(Case(TINY, 1, 1, micro=micro, single=True) for micro in (4, rows // 2))]


def write_corpus(source: Path, target: Path) -> None:
    """The first `TEXT_BYTES` of the corpus as text.

    Raises:
        InputError: no Parquet file with a column `text` there.
    """
    files = sorted(source.glob("*.parquet"))
    if not files:
        raise InputError(f"--corpus {source}: no .parquet file there; set POTSTILL_DATA or --data")
    documents: list[str] = []
    for batch in parquet.ParquetFile(files[-1]).iter_batches(64, columns=["text"]):
        documents += [" ".join(text.split()) for text in batch["text"].to_pylist()]
        if sum(map(len, documents)) > TEXT_BYTES:
            break
    write_text(target, "\n\n".join(documents))


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """Shards, those given or made in the folder, and a random teacher for each pair.

    Returns:
        The folder of shards, and the size of their vocabulary.
    """
    data = options.data
    if data is None:
        write_corpus(options.corpus, folder / "text.txt")
        data = shard(folder / "text.txt", options.tokenizer, folder / "shards")
    words = AutoTokenizer.from_pretrained(data / "tokenizer")
    for pair in {case.pair for case in options.cases}:
        teacher: Any = build_models(replace(Pair.parse(pair), vocab=len(words)), 0.1)[1]
        teacher.save_pretrained(folder / pair)
        words.save_pretrained(folder / pair)
    return Path(data).absolute(), len(words)


class Bench:
    """Runs cases and keeps seconds per step, by case and turn."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.data, self.vocab = prepare(options, folder)
        self.seconds: dict[str, list[list[float]]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def turn(self, number: int, ranks: int) -> None:
        """One start of the launcher, with the cases of this turn for so many ranks."""
        cases = [c for c in self.options.cases if c.ranks == ranks and (c.always or number == 0)]
        jobs = [self._job(case) for case in (cases if number % 2 == 0 else cases[::-1])]
        if ranks > 1 and number == 0:
            jobs.append({"kind": "link", "output": str(self.folder / "link.json"), "steps": 7})
        self._start(jobs, ranks)
        for case in cases:
            self._collect(case)

    def _job(self, case: Case) -> dict[str, Any]:
        accumulation = case.accumulation(self.options.rows)
        steps = self.options.steps * (SINGLES if case.single else 1)
        if case.stage is None:
            place = {"output": str(self.folder / case.name), "kind": "bare", "steps": steps}
            sizes = {"micro_batch": case.micro, "accumulation": accumulation, "length": LENGTH}
            models = {"pair": case.pair, "vocab": self.vocab, "precision": case.precision}
            return {**place, **sizes, **models}
        config = self.folder / f"{case.name}.json"
        write_json(config, ds_config(case, self.options.rows))
        given = {
            "--ds_config": config,
            "--data": self.data,
            "--teacher": self.folder / case.pair,
            "--student_layers": Pair.parse(case.pair).student[0],
            "--objective": "att-mse",
            "--max_steps": steps + 1,
            "--log_every": 1,
            "--validation_rows": 2,
            "--output": self.folder / case.name,
        }
        words = [str(word) for pair in given.items() for word in pair]
        return {"kind": "trainer", "arguments": words}

    def _start(self, jobs: Sequence[dict[str, Any]], ranks: int) -> None:
        """Start the ranks and wait for them.

        Raises:
            TrainingError: they failed; the end of what they printed.
        """
        path, log = self.folder / f"jobs-{ranks}.json", self.folder / f"log-{ranks}.txt"
        write_json(path, jobs)
        command = [*launch(ranks, str(ROOT / "benchmarks" / "scaling_ranks.py")), str(path)]
        command[1:1] = ["--master_port", str(free_port())]
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | own, stdout=out, stderr=subprocess.STDOUT
            )
        if done.returncode:
            end = log.read_text(errors="replace")[-2000:]
            raise TrainingError(f"{ranks} ranks ended with status {done.returncode}: {end}")

    def _collect(self, case: Case) -> None:
        """Read a case's seconds, and remove its checkpoints and models."""
        place = self.folder / case.name
        if case.stage is None:
            found = json.loads(place.read_text())
            self.facts[case.name] = {k: v for k, v in found.items() if k != "seconds"}
            self.seconds.setdefault(case.name, []).append(found["seconds"])
            return
        tokens = case.rows(self.options.rows) * LENGTH
        lines = [line for line in metrics(place) if line["kind"] == "train"][1:]
        seconds = [tokens / line["tokens_per_second"] for line in lines]
        self.seconds.setdefault(case.name, []).append(seconds)
        shutil.rmtree(place)


def free_port() -> int:
    """A port for the launcher, so that another run on the machine does not meet this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """All figures with what they depend on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = {k: v for k, v in machine(device).items() if k not in ("clock", "threads")}
    link = json.loads((bench.folder / "link.json").read_text())["all_reduce"]
    model = model_inputs(options.cases, bench.seconds, bench.facts, link)
    settings = {name: getattr(options, name) for name in ("rows", "steps", "turns", "quick")}
    return {
        "machine": where
        | {"clock": "wall", "threads_per_rank": 1, "deepspeed": version("deepspeed")},
        "settings": settings | {"length": LENGTH, "objective": "att-mse"},
        "speed": speed_rows(options.cases, bench.seconds, options.rows * LENGTH),
        "exchange": exchange_rows(options.cases, bench.seconds, model, options.rows),
        "model": model,
        "link": link,
        "seconds": bench.seconds,
    }


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=DATA / "corpus")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "vocab" / "bert-base-uncased")
    parser.add_argument("--data", type=Path, help="shards of 128 tokens, instead of a corpus")
    parser.add_argument("--turns", type=int, default=2, help="starts of each number of ranks")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a case and turn")
    parser.add_argument("--rows", type=int, default=128, help="of a step; 128 are 16,384 tokens")
    parser.add_argument("--quick", action="store_true", help="tiny models, one turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling-cpu.json")
    options = parser.parse_args()
    if options.rows < 64 or options.rows % 32:
        raise InputError(f"--rows {options.rows}: take a multiple of 32 from 64 on, such as 128")
    if options.quick:
        options.turns, options.steps = 1, 2
    options.cases = (quick_cases if options.quick else all_cases)(options.rows)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name))
        starts = [(turn, ranks) for turn in range(options.turns) for ranks in (1, 2)]
        for turn, ranks in progress(starts, desc="starts"):
            bench.turn(turn, ranks)
        figures = report(bench, options)
    for part, text in tables(figures).items():
        print(text)
        write_text(options.json.with_name(f"{options.json.stem}-{part}.md"), text)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
