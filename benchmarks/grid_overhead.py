"""What a grid costs on top of its trials: its wall time against the same trials one by one.

    python benchmarks/grid_overhead.py --output runs/overhead

The real teacher on rows of RTE and MRPC, one thread a trial: each trial by `finetune/run.py` in a
process of its own, one after another; then one grid with 1 worker, one with 2. Nothing is kept
from an earlier start: the folder must be new.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import DATA, RESULTS, execute, machine, packaged_teacher, write_report

from finetune.results import read_result

TASKS, RATES, BATCH, EPOCHS = ("rte", "mrpc"), ("3e-5", "5e-5", "8e-5"), "16", "1"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ASKED = {1: 1.1, 2: 0.65}  # of the sum, by workers


def shared(rows: int) -> list[str]:
    """The flags that runs and grids have in common."""
    most = ["--max_train_rows", str(rows), "--max_validation_rows", str(rows // 4)]
    data = ["--data", str(DATA / "glue"), "--precision", "fp32"]
    return [*data, *most, "--batch_size", BATCH, "--epochs", EPOCHS]


def one_by_one(output: Path, rows: int) -> float:
    """Seconds of all trials, each a program of its own."""
    start = time.perf_counter()
    for task, lr in itertools.product(TASKS, RATES):
        command = [sys.executable, "finetune/run.py", "--model", packaged_teacher()]
        command += ["--task", task, "--lr", lr, "--seed", "0", "--save_model", "false"]
        execute([*command, *shared(rows), "--output", output / f"{task}-{lr}"], **ONE_THREAD)
    return time.perf_counter() - start


def grid(output: Path, rows: int, workers: int) -> float:
    """Seconds of the same trials as a grid."""
    start = time.perf_counter()
    command = [sys.executable, "finetune/grid.py", "--model", f"teacher={packaged_teacher()}"]
    command += ["--tasks", ",".join(TASKS), "--lr", ",".join(RATES), "--seeds", "1"]
    command += ["--workers", str(workers), "--threads", "1"]
    execute([*command, *shared(rows), "--output", output], **ONE_THREAD)
    return time.perf_counter() - start


def inside(folders: list[Path]) -> float:
    """Seconds that the trials themselves took for training and evaluation."""
    results = [read_result(folder) for folder in folders]
    return sum(sum(result["seconds"].values()) for result in results if result is not None)


def measure(output: Path, rows: int) -> dict[str, Any]:
    """All three wall times, and what of them is training and evaluation."""
    runs = one_by_one(output / "runs", rows)
    report: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "trials": len(TASKS) * len(RATES),
        "train_rows": rows,
        "one_by_one_seconds": runs,
        "one_by_one_inside_seconds": inside(sorted((output / "runs").iterdir())),
        "grids": [],
    }
    for workers, asked in ASKED.items():
        folder = output / f"grid-{workers}"
        seconds = grid(folder, rows, workers)
        share = {"workers": workers, "seconds": seconds, "share": seconds / runs, "asked": asked}
        share["inside_seconds"] = inside(sorted(folder.glob("trials/*/*/*/")))
        report["grids"].append(share)
    return report


def table(report: dict[str, Any]) -> str:
    """The wall times as Markdown."""
    runs, within = report["one_by_one_seconds"], report["one_by_one_inside_seconds"]
    lines = [
        "| way | seconds | of these training and evaluation, summed | share | asked |",
        "|---|---:|---:|---:|---:|",
        f"| one by one, {report['trials']} programs | {runs:.0f} | {within:.0f} | 1.00 | |",
    ]
    lines += [
        f"| grid, {one['workers']} worker(s) | {one['seconds']:.0f} | {one['inside_seconds']:.0f} "
        f"| {one['share']:.2f} | ≤ {one['asked']} |"
        for one in report["grids"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--rows", type=int, default=2000, help="training rows a task, at most")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.output.exists():
        parser.error(f"--output {chosen.output}: exists; what is finished there would cost nothing")
    report = measure(chosen.output, chosen.rows)
    write_report(chosen.results / "grid-overhead.json", report, table(report))
    print(json.dumps(report, indent=2), table(report), sep="\n")


if __name__ == "__main__":
    main()
