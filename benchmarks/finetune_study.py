"""Fine-tune teacher and student on four GLUE tasks, and put the scores beside the majority class.

    python benchmarks/finetune_study.py --model student=runs/real/att-mse-uniform/student \\
        --output runs/finetune

Every model gets the same settings per task (`SETTINGS`), one seed, no grid; the score is that of
the last epoch. Finished runs are kept when the same command is given again. Several runs go side
by side, each on its share of the cores (`--workers`).
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import DATA, RESULTS, execute, packaged_teacher, write_report

from finetune.results import read_result

SETTINGS: dict[str, list[str]] = {
    "sst2": ["--lr", "5e-5", "--batch_size", "32", "--epochs", "1", "--max_train_rows", "20000"],
    "mrpc": ["--lr", "5e-5", "--batch_size", "16", "--epochs", "5"],
    "rte": ["--lr", "8e-5", "--batch_size", "16", "--epochs", "10"],
    "cola": ["--lr", "5e-5", "--batch_size", "16", "--epochs", "5"],
}  # the longest first


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    data: Path
    output: Path
    precision: str
    threads: int


def fine_tune(name: str, model: Path, task: str, study: Study) -> dict[str, Any]:
    """One run through the program itself; its result."""
    folder = study.output / name / task
    command = [sys.executable, "finetune/run.py", "--model", str(model), "--task", task]
    command += ["--data", str(study.data), *SETTINGS[task], "--save_model", "false"]
    command += ["--precision", study.precision, "--output", str(folder)]
    execute(command, OMP_NUM_THREADS=str(study.threads))
    result = read_result(folder)
    assert result is not None
    return without_paths(result)


def without_paths(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result holds anywhere: nothing that names a folder of this machine."""
    local = ("model", "source", "potstill")
    kept = {name: value for name, value in result.items() if name not in local}
    settings = ("lr", "batch_size", "epochs", "seed", "max_length", "precision")
    kept["settings"] = {name: result["settings"][name] for name in settings}
    kept["environment"] = {n: v for n, v in result["environment"].items() if n != "command"}
    return kept


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Scores in per cent as Markdown, a row per task, metric and model."""
    names = " | ".join(results)
    rows = [f"| task | metric | majority | {names} | rows | epochs | batch |"]
    rows.append("|---|---|---:|" + "---:|" * (len(results) + 3))
    first = next(iter(results.values()))
    for task, result in first.items():
        for metric, constant in result["majority"]["validation"].items():
            scores = [
                percent(of_model[task]["last"]["scores"]["validation"][metric])
                for of_model in results.values()
            ]
            settings = result["settings"]
            rows.append(
                f"| {task} | {metric} | {percent(constant)} | {' | '.join(scores)} "
                f"| {result['rows']['train']:,} | {settings['epochs']} | {settings['batch_size']} |"
            )
    return "\n".join(rows)


def percent(score: float | None) -> str:
    """A score as the papers print it."""
    return "–" if score is None else f"{100 * score:.1f}"


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a model to fine-tune, again for each; the real teacher is always there",
    )
    parser.add_argument("--tasks", default=",".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=DATA / "glue")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    models = {"teacher": packaged_teacher()}
    models.update((name, Path(folder)) for name, folder in (m.split("=") for m in chosen.model))
    threads = max(1, (os.cpu_count() or 1) // chosen.workers)
    study = Study(chosen.data, chosen.output, chosen.precision, threads)
    tasks = chosen.tasks.split(",")
    with ThreadPoolExecutor(chosen.workers) as pool:
        pending = {
            (name, task): pool.submit(fine_tune, name, model, task, study)
            for task in tasks
            for name, model in models.items()
        }
        results = {name: {task: pending[name, task].result() for task in tasks} for name in models}
    report = {"date": datetime.now(UTC).date().isoformat(), "results": results}
    write_report(chosen.results / "finetune-study.json", report, table(results) + "\n")
    print(json.dumps(report) if chosen.json else table(results))


if __name__ == "__main__":
    main()
