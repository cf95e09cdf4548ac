"""The sharder against two usual ways from text to training data, on one core and on two.

    python benchmarks/shards.py

The same text goes through the sharder, `datasets.map` + `group_texts` (run_mlm) and a static-mask
pipeline of Python loops with gzip HDF5, with either of two tokenizers (see `text_pipelines.py`),
in turns, each in a process of its own with one thread; and through the sharder with tokie where
that is installed. The yardstick for speed is the static-mask pipeline with BERT's tokenizer in
Python, the only one that those scripts had when they were released. Times are of the processor, so
that other work counts less; ratios are taken turn by turn; medians with quartiles. Then a larger
text with 1 and 2 workers (wall time), the share of time that is not the tokenizer's, and the
resident memory of each process on a text, and a JSON text, of one line. About 7 minutes on two
cores.
Writes `results/shards.{json,md}`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from common import DATA, RESULTS, ROOT, machine, quartiles, write_report

from data_prep.corpus import find_sources
from data_prep.readers import ReadOptions
from potstill.console import program
from potstill.errors import InputError, PotstillError

PIPELINES = {
    "ours": "the sharder",
    "ours_tokie": "the sharder, `--engine tokie`",
    "run_mlm": "`datasets.map` + `group_texts`",
    "static_mask": "static masks, Python loops, gzip; transformers 5's tokenizer",
    "python_tokenizer": "the same with BERT's tokenizer in Python, as released",
}
RELEASED = "python_tokenizer"  # the pipeline that stands for the scripts as released
ERROR_CHARACTERS = 2000  # of what a failed pipeline wrote to stderr
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}


def sample(inputs: list[str], characters: int, path: Path) -> Path:
    """The beginnings of all sources as one text: lines, a blank line after each document."""
    sources = find_sources(inputs)
    share = characters // len(sources)
    with open(path, "w", encoding="utf-8") as file:
        for source in sources:
            left = share
            for text in documents(source):
                lines = [line for line in text[:left].splitlines() if line.strip()]
                file.write("\n".join(lines) + "\n\n")
                left -= len(text)
                if left <= 0:
                    break
    return path


def documents(source: Any) -> Any:
    """The texts of a source."""
    held = ""
    for fragment in source.fragments(ReadOptions()):
        held += fragment.text
        if fragment.ends:
            yield held
            held = ""


def one_line(text: Path, megabytes: int, folder: Path) -> dict[str, Path]:
    """A text, and a JSON file, of one line of that size."""
    line = " ".join(text.read_text(encoding="utf-8").split())
    line = (line + " ") * (megabytes * 10**6 // len(line.encode()) + 1)
    line = line.encode()[: megabytes * 10**6].decode(errors="ignore")
    paths = {"text": folder / "line.txt", "JSON": folder / "line.jsonl"}
    paths["text"].write_text(line, encoding="utf-8")
    paths["JSON"].write_text(json.dumps({"text": line}) + "\n", encoding="utf-8")
    return paths


class Started(NamedTuple):
    """A pipeline's process, and the file that takes its stderr."""

    process: "subprocess.Popen[str]"
    errors: Path


class Runner:
    """Starts pipelines, each in a process and a folder of its own."""

    def __init__(self, tokenizer: str, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._count = 0

    def start(self, pipeline: str, text: Path, workers: int = 1) -> Started:
        """The process of a pipeline."""
        self._count += 1
        command = [sys.executable, str(ROOT / "benchmarks" / "text_pipelines.py"), pipeline]
        command += ["--input", str(text), "--tokenizer", self._tokenizer]
        command += ["--output", str(self._folder / str(self._count)), "--workers", str(workers)]
        errors = self._folder / f"{self._count}.stderr"
        with open(errors, "w") as file:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | ENVIRONMENT,
            )
        return Started(process, errors)

    def figures(self, pipeline: str, text: Path, workers: int = 1) -> dict[str, float]:
        """What a pipeline prints of itself."""
        return printed(self.start(pipeline, text, workers))

    def memory(self, text: Path, workers: int) -> dict[str, float]:
        """The highest resident MiB of the sharder's first process and of a worker."""
        peaks: dict[int, int] = {}
        started = self.start("ours", text, workers)
        while started.process.poll() is None:
            for pid, held in resident(started.process.pid).items():
                peaks[pid] = max(held, peaks.get(pid, 0))
            time.sleep(0.02)
        printed(started)
        first = peaks.pop(started.process.pid)
        return {"reader": first / 2**20, "worker": max(peaks.values()) / 2**20}


def printed(started: Started) -> dict[str, float]:
    """The figures in the last line of a process that must end well.

    Raises:
        PotstillError: it failed; with the end of what it wrote to stderr.
    """
    output = started.process.communicate()[0]
    if status := started.process.returncode:
        end = started.errors.read_text(errors="replace").strip()[-ERROR_CHARACTERS:]
        raise PotstillError(f"a pipeline ended with status {status}: {end}")
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def resident(pid: int) -> dict[int, int]:
    """Resident bytes of a process and of its descendants, as far as they live."""
    found = {}
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            found[process.pid] = process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return found


def told(found: dict[str, float], form: str, unit: float = 1) -> str:
    """A spread as `median (low-high)`, in one format."""
    middle, low, high = (format(found[name] / unit, form) for name in ("median", "low", "high"))
    return f"{middle} ({low}-{high})"


def compare(runner: Runner, text: Path, turns: int) -> list[dict[str, Any]]:
    """A row for each pipeline; `time` is its processor time as a multiple of the sharder's."""
    tokens = runner.figures("count", text)["tokens"]
    names = [n for n in PIPELINES if n != "ours_tokie" or importlib.util.find_spec("tokie")]
    runs = [{name: runner.figures(name, text) for name in names} for _ in range(turns)]
    rows = []
    for name in names:
        mine = [turn[name] for turn in runs]
        ours = [turn["ours"]["processor_seconds"] for turn in runs]
        seconds = [figures["processor_seconds"] for figures in mine]
        row = {
            "pipeline": name,
            "tokens": tokens,
            "dropped": tokens - mine[0]["kept"],
            "bytes_per_token": mine[0]["bytes"] / mine[0]["kept"],
            "tokens_per_processor_second": quartiles([tokens / s for s in seconds]),
            "tokens_per_second": quartiles([tokens / f["wall_seconds"] for f in mine]),
            "time": quartiles([s / own for s, own in zip(seconds, ours, strict=True)]),
        }
        rows.append(row)
    return rows


def scale(runner: Runner, text: Path, turns: int) -> dict[str, Any]:
    """Wall time of 1 and 2 workers, and the share of one process's time outside the tokenizer."""
    runs = [[runner.figures("ours", text, workers) for workers in (1, 2)] for _ in range(turns)]
    shares = [1 - one["tokenizer_seconds"] / one["processor_seconds"] for one, _ in runs]
    return {
        "tokens": runs[0][0]["kept"],
        "wall_1_worker": quartiles([one["wall_seconds"] for one, _ in runs]),
        "wall_2_workers": quartiles([two["wall_seconds"] for _, two in runs]),
        "speed_up": quartiles([one["wall_seconds"] / two["wall_seconds"] for one, two in runs]),
        "added_work": quartiles(
            [two["processor_seconds"] / one["processor_seconds"] - 1 for one, two in runs]
        ),
        "share_outside_tokenizer": quartiles(shares),
    }


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| pipeline, one core | M tokens/s of processor time | M tokens/s, wall "
        "| time against ours | body tokens dropped | bytes per token kept |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        speed, wall = row["tokens_per_processor_second"], row["tokens_per_second"]
        lines.append(
            f"| {PIPELINES[row['pipeline']]} | {told(speed, '.2f', 1e6)} "
            f"| {told(wall, '.2f', 1e6)} | {told(row['time'], '.2f')} "
            f"| {row['dropped'] / row['tokens']:.2%} | {row['bytes_per_token']:.2f} |"
        )
    found, line = report["scale"], report["memory"]
    lines += [
        "",
        "| the sharder, median (quartiles) | |",
        "|---|---:|",
    ]
    lines += [
        f"| time of the scripts as released, with BERT's tokenizer in Python, against ours "
        f"| {told(row['time'], '.2f')} |"
        for row in report["rows"]
        if row["pipeline"] == RELEASED
    ]
    lines += [
        f"| 1 -> 2 workers, times as fast on {found['tokens'] / 1e6:.1f} M tokens, wall "
        f"| {told(found['speed_up'], '.2f')} |",
        "| share of time outside the tokenizer "
        f"| {told(found['share_outside_tokenizer'], '.1%')} |",
    ]
    lines += [
        f"| a {kind} line of {line['megabytes']} MB: MiB of the reading process, of a worker "
        f"| {line[kind]['reader']:,.0f}, {line[kind]['worker']:,.0f} |"
        for kind in ("text", "JSON")
    ]
    return "\n".join(lines)


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", default=[str(DATA / "corpus")], help="as for data_prep/shard.py")
    add("--tokenizer", default=str(DATA / "vocab" / "bert-base-uncased"))
    add("--turns", type=int, default=3, help="2 or more, because one has no spread (default: 3)")
    add("--characters", type=int, default=12_000_000, help="of the text that all pipelines read")
    add("--larger", type=int, default=8, help="times that text for 1 and 2 workers")
    add("--line_megabytes", type=int, default=100)
    add("--json", type=Path, default=RESULTS / "shards.json", help="the table goes beside it")
    args = parser.parse_args()
    if args.turns < 2:
        raise InputError(f"--turns is {args.turns}, and one turn has no spread; give 2 or more")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = Runner(args.tokenizer, folder)
        text = sample(args.input, args.characters, folder / "text.txt")
        larger = sample(args.input, args.larger * args.characters, folder / "larger.txt")
        report = {
            "machine": machine(torch.device("cpu")),
            "turns": args.turns,
            "rows": compare(runner, text, args.turns),
            "scale": scale(runner, larger, args.turns),
        }
        lines = one_line(text, args.line_megabytes, folder)
        memory = {kind: runner.memory(path, workers=2) for kind, path in lines.items()}
        report["memory"] = {"megabytes": args.line_megabytes, **memory}
    write_report(args.json, report, tables(report) + "\n")
    print(tables(report))


if __name__ == "__main__":
    main()
