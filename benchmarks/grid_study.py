"""The real teacher and distilled students on five GLUE tasks, as a grid, and the page made of it.

    python benchmarks/grid_study.py --output runs/grid \\
        --model att-mse-uniform=runs/real/att-mse-uniform/student \\
        --model att-mse-random=runs/real/att-mse-random/student

Two learning rates, three seeds, evenly spaced rows of each task: what two cores do in about an
hour. The same command goes on where it was stopped. The tables go to benchmarks/results/, the page
to docs/report.html; benchmarks/page_screenshot.py makes pictures of it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from common import DATA, RESULTS, ROOT, execute, packaged_teacher

from finetune.reporting.tables import costs_table, scores_table

TASKS = "cola,mrpc,rte,stsb,sst2"
PAGE = ROOT / "docs" / "report.html"


def run_grid(models: dict[str, Path], chosen: argparse.Namespace) -> Path:
    """Run the trials that are missing; the folder of the grid."""
    grid = chosen.output / "grid"
    named = [f"{name}={folder}" for name, folder in models.items()]
    command = [sys.executable, "finetune/grid.py", "--model", *named, "--tasks", chosen.tasks]
    command += ["--data", str(chosen.data), "--output", str(grid), "--lr", chosen.lr]
    command += ["--batch_size", "16", "--epochs", str(chosen.epochs), "--seeds", str(chosen.seeds)]
    command += ["--max_train_rows", str(chosen.rows), "--precision", chosen.precision]
    execute([*command, "--workers", str(chosen.workers)])
    return grid


def write_page(grid: Path, chosen: argparse.Namespace) -> None:
    """Report the grid; tables and page take their places in the repository."""
    report = chosen.output / "report"
    title = "A real teacher and its distilled students on GLUE"
    program = [sys.executable, "finetune/report.py", str(grid), "--output", str(report)]
    execute([*program, "--title", title])
    for suffix in ("json", "md", "csv"):
        shutil.copyfile(report / f"report.{suffix}", RESULTS / f"grid-study.{suffix}")
    shutil.copyfile(report / "report.html", PAGE)
    content = json.loads((report / "report.json").read_text())
    for part, made in (("scores", scores_table), ("costs", costs_table)):
        (RESULTS / f"grid-study-{part}.md").write_text(made(content) + "\n")


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a student, again for each; the real teacher is always there",
    )
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--rows", type=int, default=2000, help="training rows of a task, at most")
    parser.add_argument("--lr", default="5e-5,1e-4")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA / "glue")
    parser.add_argument("--precision", default="auto", help="fp32, bf16 or auto")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side")
    parser.add_argument("--output", type=Path, required=True, help="folder of grid and report")
    chosen = parser.parse_args()
    models = {"teacher": packaged_teacher()}
    if wrong := [text for text in chosen.model if "=" not in text]:
        parser.error(f"--model {wrong[0]}: give NAME=DIR")
    models.update((n, Path(folder)) for n, folder in (text.split("=", 1) for text in chosen.model))
    write_page(run_grid(models, chosen), chosen)


if __name__ == "__main__":
    main()
