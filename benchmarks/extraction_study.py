"""Does extraction pay? Distil one student from three starts, with the same steps and data.

    python benchmarks/extraction_study.py --teacher runs/head/frozen/student --output runs/etd

6 x 384 to 3 x 192 with the `etd` objective, started from ETD-Impt, from ETD-Rand and from random
weights; several seeds, which change data order, masks, random starts and projections. The three
starts of a seed are trained in one run (`--students`), so that they see the same batches. Writes
the held-out distillation loss with its spread, and the share of the steps after which a start
has the loss that random weights have at the end ("Extract then Distill" says 28 % of the compute
for ETD-Impt). Parts continue where they stopped.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    DATA,
    IMAGES,
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
from matplotlib.figure import Figure

from potstill.files import write_json

LAYERS, HIDDEN, HEADS, FFN = 3, 192, 12, 768
STARTS = {"etd-impt": "ETD-Impt", "etd-rand": "ETD-Rand", "random": "random weights"}
COLOURS = {"etd-impt": "#1b6ca8", "etd-rand": "#4d9e4d", "random": "#d1603d"}
ROWS = 64  # a step: 8,192 tokens


@dataclass(frozen=True)
class Study:
    """What is run."""

    teacher: Path
    shards: Path
    sizes: Path
    steps: int
    ranks: int
    lr: float
    output: Path


def extract(study: Study, method: str, seed: int) -> Path:
    """Cut a student; the most important neurons do not depend on a seed."""
    folder = study.output / (method if method == "etd-impt" else f"{method}-{seed}")
    program = [sys.executable, "pretrain/extract.py"]
    if method == "etd-impt":
        program = launch(study.ranks, "pretrain/extract.py")
    chosen = 0 if method == "etd-impt" else seed
    execute(
        [*program, "--teacher", study.teacher, "--data", study.shards, "--method", method]
        + ["--layers", str(LAYERS), "--hidden", str(HIDDEN), "--ffn", str(FFN)]
        + ["--seed", str(chosen), "--validation_rows", "256", "--output", folder]
    )
    return folder


def distil(study: Study, seed: int) -> Path:
    """All starts of a seed, in one run."""
    shape = {"student_layers": LAYERS, "student_hidden": HIDDEN, "student_heads": HEADS}
    starts: dict[str, dict[str, Any]] = {
        "etd-impt": {"student": str(extract(study, "etd-impt", seed))},
        "etd-rand": {"student": str(extract(study, "etd-rand", seed))},
        "random": {**shape, "student_ffn": FFN, "init": "random"},
    }
    students = study.output / f"students-{seed}.json"
    write_json(students, starts)
    folder = study.output / f"seed-{seed}"
    execute(
        launch(study.ranks, "pretrain/run.py")
        + ["--ds_config", str(study.sizes), "--data", str(study.shards)]
        + ["--teacher", str(study.teacher), "--students", str(students), "--objective", "etd"]
        + ["--dropout", "0", "--lr", str(study.lr), "--max_steps", str(study.steps)]
        + ["--validate_every", "10", "--validation_rows", "128", "--log_every", "10"]
        + ["--seed", str(seed), "--output", str(folder)]
    )
    return folder


def curve(folder: Path, start: str) -> list[tuple[int, float]]:
    """(step, held-out loss) of a student."""
    lines = metrics(folder / "students" / start)
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]


def steps_until(points: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve reaches a loss, between two validations by the straight line."""
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= loss:
            return before + (after - before) * (high - max(loss, low)) / (high - low)
    return None


def summary(curves: dict[str, list[list[tuple[int, float]]]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over seeds: loss at start and end, share of the steps random weights take."""
    ends = [points[-1] for points in curves["random"]]
    found = {}
    for start, of_seeds in curves.items():
        last = [points[-1][1] for points in of_seeds]
        reached = [
            steps_until(points, loss) for points, (_, loss) in zip(of_seeds, ends, strict=True)
        ]
        share = [100 * r / end for r, (end, _) in zip(reached, ends, strict=True) if r is not None]
        found[start] = {
            "first": statistics.mean(points[0][1] for points in of_seeds),
            "last": statistics.mean(last),
            "spread": statistics.stdev(last) if len(last) > 1 else 0.0,
            "lasts": last,
            "percent_of_steps": share,
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| start | held-out loss, step 0 | at the end (std over seeds) | steps for random's end |"
    ]
    lines.append("|---|---:|---:|---:|")
    for start, row in found.items():
        share = row["percent_of_steps"]
        steps = f"{min(share):.0f}-{max(share):.0f} %" if share else "not reached"
        lines.append(
            f"| {STARTS[start]} | {row['first']:.3f} | {row['last']:.4f} ({row['spread']:.4f}) "
            f"| {steps} |"
        )
    return "\n".join(lines)


def draw(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Held-out loss against step, a line a seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for start, of_seeds in curves.items():
        for number, points in enumerate(of_seeds):
            label = None if number else STARTS[start]
            axes.plot(*zip(*points, strict=True), color=COLOURS[start], label=label, linewidth=1)
    axes.set(xlabel="step (8,192 tokens each)", ylabel="held-out att-mse + hid-seq", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--teacher", type=Path, required=True, help="with an MLM head")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--shards", type=Path, help="shards of the corpus, if they exist")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu_bf16.json")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    vocabulary = DATA / "vocab" / "bert-base-uncased"
    shards = chosen.shards or shard(DATA / "corpus", vocabulary, output / "shards")
    sizes = write_ds_config(chosen.ds_config, output / "ds_config.json", ROWS, chosen.ranks)
    study = Study(chosen.teacher, shards, sizes, chosen.steps, chosen.ranks, chosen.lr, output)
    folders = [distil(study, seed) for seed in range(chosen.seeds)]
    curves = {start: [curve(folder, start) for folder in folders] for start in STARTS}
    found = summary(curves)
    extraction = without(output / "etd-impt" / "extraction.json", "kept", "identity")
    report = {
        "summary": found,
        "curves": curves,
        "lr": chosen.lr,
        "extraction": extraction,
        "environment": without(folders[0] / "students" / "random" / "environment.json", "command"),
    }
    write_report(chosen.results / "extraction-study.json", report, table(found) + "\n")
    draw(curves, chosen.images / "extraction-study.svg")
    print(json.dumps(report) if chosen.json else table(found))


if __name__ == "__main__":
    main()
