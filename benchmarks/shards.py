"""The sharder against two usual ways from text to training data, on one core and on two.

    python benchmarks/shards.py

The same text goes through the sharder, `datasets.map` + `group_texts` (run_mlm) and a static-mask
pipeline of Python loops with gzip HDF5, with either of two tokenizers (see `text_pipelines.py`),
in turns, each in a process of its own with one thread; and through the sharder with tokie where
that is installed. Times are of the processor, so that other work counts less; ratios are taken turn
by turn. Then a larger text with 1 and 2 workers (wall time), the share of time that is not the
tokenizer's, and the resident memory of each process on a text, and a JSON text, of one line. About
7 minutes on two cores.
Writes `results/shards.{json,md}`.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import DATA, RESULTS, ROOT, machine

from data_prep.corpus import find_sources
from data_prep.readers import ReadOptions
from potstill.console import program
from potstill.files import write_json, write_text

PIPELINES = {
    "ours": "the sharder",
    "ours_tokie": "the sharder, `--engine tokie`",
    "run_mlm": "`datasets.map` + `group_texts`",
    "static_mask": "static masks, Python loops, gzip; transformers 5's tokenizer",
    "python_tokenizer": "the same with BERT's tokenizer in Python, as released",
}
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


class Runner:
    """Starts pipelines, each in a process and a folder of its own."""

    def __init__(self, tokenizer: str, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._count = 0

    def start(self, pipeline: str, text: Path, workers: int = 1) -> "subprocess.Popen[str]":
        """The process of a pipeline."""
        self._count += 1
        command = [sys.executable, str(ROOT / "benchmarks" / "text_pipelines.py"), pipeline]
        command += ["--input", str(text), "--tokenizer", self._tokenizer]
        command += ["--output", str(self._folder / str(self._count)), "--workers", str(workers)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def figures(self, pipeline: str, text: Path, workers: int = 1) -> dict[str, float]:
        """What a pipeline prints of itself."""
        return printed(self.start(pipeline, text, workers))

    def memory(self, text: Path, workers: int) -> dict[str, float]:
        """The highest resident MiB of the sharder's first process and of a worker."""
        peaks: dict[int, int] = {}
        process = self.start("ours", text, workers)
        while process.poll() is None:
            for pid, held in resident(process.pid).items():
                peaks[pid] = max(held, peaks.get(pid, 0))
            time.sleep(0.02)
        printed(process)
        first = peaks.pop(process.pid)
        return {"reader": first / 2**20, "worker": max(peaks.values()) / 2**20}


def printed(process: "subprocess.Popen[str]") -> dict[str, float]:
    """The figures in the last line of a process that must end well."""
    output = process.communicate()[0]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, output)
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


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of one value thrice that value."""
    return summary(values * 2 if len(values) == 1 else values)


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
            "tokens_per_processor_second": spread([tokens / s for s in seconds]),
            "tokens_per_second": spread([tokens / f["wall_seconds"] for f in mine]),
            "time": spread([s / own for s, own in zip(seconds, ours, strict=True)]),
        }
        rows.append(row)
    return rows


def scale(runner: Runner, text: Path, turns: int) -> dict[str, Any]:
    """Wall time of 1 and 2 workers, and the share of one process's time outside the tokenizer."""
    runs = [[runner.figures("ours", text, workers) for workers in (1, 2)] for _ in range(turns)]
    shares = [1 - one["tokenizer_seconds"] / one["processor_seconds"] for one, _ in runs]
    return {
        "tokens": runs[0][0]["kept"],
        "wall_1_worker": spread([one["wall_seconds"] for one, _ in runs]),
        "wall_2_workers": spread([two["wall_seconds"] for _, two in runs]),
        "speed_up": spread([one["wall_seconds"] / two["wall_seconds"] for one, two in runs]),
        "added_work": spread(
            [two["processor_seconds"] / one["processor_seconds"] - 1 for one, two in runs]
        ),
        "share_outside_tokenizer": spread(shares),
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
            f"| {PIPELINES[row['pipeline']]} | {speed['median'] / 1e6:.2f} "
            f"({speed['low'] / 1e6:.2f}-{speed['high'] / 1e6:.2f}) | {wall['median'] / 1e6:.2f} "
            f"| {row['time']['median']:.2f} | {row['dropped'] / row['tokens']:.2%} "
            f"| {row['bytes_per_token']:.2f} |"
        )
    found, line = report["scale"], report["memory"]
    outside = found["share_outside_tokenizer"]["median"]
    lines += [
        "",
        "| the sharder | |",
        "|---|---:|",
        f"| 1 -> 2 workers, wall time of {found['tokens'] / 1e6:.1f} M tokens "
        f"| {found['speed_up']['median']:.2f}x |",
        f"| share of time outside the tokenizer | {outside:.1%} |",
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
    add("--turns", type=int, default=3)
    add("--characters", type=int, default=12_000_000, help="of the text that all pipelines read")
    add("--larger", type=int, default=8, help="times that text for 1 and 2 workers")
    add("--line_megabytes", type=int, default=100)
    add("--json", type=Path, default=RESULTS / "shards.json", help="the table goes beside it")
    args = parser.parse_args()
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
    write_json(args.json, report)
    write_text(args.json.with_suffix(".md"), tables(report) + "\n")
    print(tables(report))


if __name__ == "__main__":
    main()
