"""Which objective makes the better student? Students of equal budget, fine-tuned and compared.

    python benchmarks/objective_study.py --teacher runs/head/frozen/student --output runs/objectives

Students of half the teacher's layers with random weights are distilled in one run, one an
objective (`--students`: the teacher runs once for all of them), on about a million tokens; each is
fine-tuned on small GLUE tasks with several seeds. The table gives mean and standard deviation over
seeds, with the figures of the ACL paper's Table 2 beside them (its students saw 13,000 times as
many tokens, and were chosen from a grid). A student with random weights that saw nothing is
in the table too. Finished runs are kept when the same command is given again.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    DATA,
    RESULTS,
    ROOT,
    execute,
    launch,
    metrics,
    shard,
    without,
    write_ds_config,
    write_report,
)
from transformers import AutoConfig, AutoModelForMaskedLM

from finetune.results import read_result
from potstill.files import whole_folder, write_json

PAPER = {  # ACL 2023, Table 2: RTE accuracy, MRPC F1, CoLA Matthews; average over seven tasks
    "vanilla-kd": (61.0, 86.5, 54.4, 79.3),
    "hid-cls": (61.0, 73.0, 33.9, 73.4),
    "hid-seq": (67.2, 89.2, 48.2, 79.7),
    "att-mse": (69.7, 90.6, 53.5, 81.3),
    "att-kl": (66.1, 90.1, 43.6, 78.4),
    "att-kl+val-kl": (66.7, 91.0, 47.7, 80.0),
}
UNTOUCHED = "none (random weights)"
METRICS = {"rte": "accuracy", "mrpc": "f1", "cola": "mcc"}
ROWS = 64  # a step: 8,192 tokens


@dataclass(frozen=True)
class Study:
    """What all parts share."""

    teacher: Path
    shards: Path
    sizes: Path
    output: Path
    steps: int
    epochs: int
    seeds: int
    rows: int | None
    precision: str
    workers: int


def slug(objective: str) -> str:
    """An objective's name as that of a folder."""
    return objective.replace("+", "-and-").split(" ")[0]


def distil(study: Study) -> Path:
    """A student for each objective, in one run."""
    folder, students = study.output / "distilled", study.output / "students.json"
    write_json(students, {slug(objective): {"objective": objective} for objective in PAPER})
    execute(
        launch(2, "pretrain/run.py")
        + ["--ds_config", str(study.sizes), "--data", str(study.shards)]
        + ["--teacher", str(study.teacher), "--students", str(students), "--init", "random"]
        + ["--lr", "1e-3", "--max_steps", str(study.steps), "--validation_rows", "128"]
        + ["--dropout", "0.1", "--output", str(folder)]
    )
    return folder


def random_student(study: Study, like: Path) -> Path:
    """A model of a student's shape that never saw any text; with the same tokenizer."""
    folder = study.output / "untouched"
    if not folder.exists():
        torch.manual_seed(1)
        with whole_folder(folder) as beside:
            AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(like)).save_pretrained(
                beside
            )
            shutil.copytree(study.shards / "tokenizer", beside, dirs_exist_ok=True)
    return folder


def fine_tune(study: Study, name: str, model: Path, task: str, seed: int) -> dict[str, Any]:
    """One run through the program itself; its scores, and the constant answer's."""
    folder = study.output / "finetuned" / name / f"{task}-{seed}"
    command = [sys.executable, "finetune/run.py", "--model", str(model), "--task", task]
    command += ["--data", str(DATA / "glue"), "--lr", "1e-4", "--batch_size", "32"]
    command += ["--epochs", str(study.epochs), "--seed", str(seed), "--save_model", "false"]
    command += ["--precision", study.precision, "--output", str(folder)]
    if study.rows:
        command += ["--max_train_rows", str(study.rows)]
    threads = max(1, (os.cpu_count() or 1) // study.workers)
    if read_result(folder) is None:
        execute(command, OMP_NUM_THREADS=str(threads))
    result = read_result(folder)
    assert result is not None
    metric = METRICS[task]
    return {
        "score": result["last"]["scores"]["validation"][metric],
        "majority": result["majority"]["validation"][metric],
        "rows": result["rows"]["train"],
    }


def table(scores: dict[str, dict[str, list[float]]], majority: dict[str, float]) -> str:
    """Mean and standard deviation in per cent, the paper's figure in brackets."""
    names = {"rte": "RTE acc", "mrpc": "MRPC F1", "cola": "CoLA Mcc"}
    head = " | ".join(names[task] for task in METRICS)
    lines = [
        f"| objective | {head} | mean of the three | paper's average |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for objective, of_tasks in scores.items():
        paper = PAPER.get(objective)
        cells, means = [], []
        for place, values in enumerate(of_tasks.values()):
            mean, spread = statistics.mean(values), statistics.stdev(values)
            means.append(mean)
            beside = f" [{paper[place]}]" if paper else ""
            cells.append(f"{100 * mean:.1f} ± {100 * spread:.1f}{beside}")
        average = f"{paper[3]}" if paper else ""
        name = objective if objective == UNTOUCHED else f"`{objective}`"
        lines.append(
            f"| {name} | {' | '.join(cells)} | {100 * statistics.mean(means):.1f} | {average} |"
        )
    constant = " | ".join(f"{100 * majority[task]:.1f}" for task in METRICS)
    mean = 100 * statistics.mean(majority.values())
    lines.append(f"| always the same answer | {constant} | {mean:.1f} | |")
    return "\n".join(lines)


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--teacher", type=Path, required=True, help="with an MLM head")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--shards", type=Path, help="shards of the corpus, if they exist")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu_bf16.json")
    parser.add_argument("--steps", type=int, default=125, help="of 8,192 tokens")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--rows", type=int, help="fine-tune on so many rows of each task only")
    parser.add_argument("--precision", default="auto", help="of fine-tuning: fp32, bf16 or auto")
    parser.add_argument("--workers", type=int, default=2, help="fine-tuning runs side by side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    shards = chosen.shards or shard(
        DATA / "corpus", DATA / "vocab" / "bert-base-uncased", output / "shards"
    )
    sizes = write_ds_config(chosen.ds_config, output / "ds_config.json", ROWS, 2)
    study = Study(
        chosen.teacher,
        shards,
        sizes,
        output,
        chosen.steps,
        chosen.epochs,
        chosen.seeds,
        chosen.rows,
        chosen.precision,
        chosen.workers,
    )
    distilled = distil(study)
    models = {o: distilled / "students" / slug(o) / "student" for o in PAPER}
    models[UNTOUCHED] = random_student(study, models["att-mse"])
    with ThreadPoolExecutor(study.workers) as pool:
        pending = {
            (name, task, seed): pool.submit(fine_tune, study, slug(name), model, task, seed)
            for task in METRICS
            for seed in range(study.seeds)
            for name, model in models.items()
        }
        done = {key: future.result() for key, future in pending.items()}
    seeds = range(study.seeds)
    scores = {
        name: {task: [done[name, task, seed]["score"] for seed in seeds] for task in METRICS}
        for name in models
    }
    first = next(iter(models))
    majority = {task: done[first, task, 0]["majority"] for task in METRICS}
    held_out = {
        o: [
            line["loss"]
            for line in metrics(distilled / "students" / slug(o))
            if line["kind"] == "validation"
        ]
        for o in PAPER
    }
    report = {
        "scores": scores,
        "majority": majority,
        "rows": {task: done[first, task, 0]["rows"] for task in METRICS},
        "epochs": study.epochs,
        "steps": study.steps,
        "held_out": held_out,
        "paper": PAPER,
        "environment": without(
            distilled / "students" / slug(first) / "environment.json", "command"
        ),
    }
    write_report(chosen.results / "objective-study.json", report, table(scores, majority) + "\n")
    print(json.dumps(report) if chosen.json else table(scores, majority))


if __name__ == "__main__":
    main()
