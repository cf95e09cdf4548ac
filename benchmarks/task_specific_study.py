"""Task-specific distillation in kind with the ACL paper's Table 3: objectives x layer choices.

    python benchmarks/task_specific_study.py --output runs/task-specific

The real teacher (6 layers x 384) is fine-tuned on RTE and MRPC, from an MNLI-tuned start, because
without one it is not clearly beyond the majority class on RTE. Then students of three layers are
distilled from it: stage 1 by an objective (vanilla-kd has none), stage 2 by its predictions, from
three choices of teacher layers, three seeds each. The teacher's features are stored once. The same
command goes on where it was stopped. A table is written beside the paper's, with paired t-tests and
rank correlations: what agrees?
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import DATA, RESULTS, execute, machine, packaged_teacher, write_report
from scipy.stats import spearmanr

from finetune.reporting.papers import paper_rows
from finetune.reporting.selection import Best, best_of_grid, read_trials
from finetune.reporting.significance import paired

TASKS = ("rte", "mrpc")
PAPER_METRIC = {"rte": "accuracy", "mrpc": "accuracy"}  # HTD's MRPC "F1" lies below always-yes
CHOICES = {"2-4-6": "4,8,12", "1-4-6": "1,8,12", "1-2-3": "1,2,3"}  # ours of 6, the paper's of 12
OBJECTIVES = ("vanilla-kd", "hid-cls", "hid-seq", "att-mse")
Values = dict[tuple[str, str, str], dict[int, float | None]]  # task, objective, choice: by seed


def paper_score(task: str, objective: str, choice: str) -> Mapping[str, Any]:
    """Mean and standard deviation, as fractions, of a cell of the paper's Table 3."""
    for row in paper_rows():
        place = (row["paper"], row["table"], row["objective"], row["init"])
        if place == ("HTD", "3", objective, CHOICES[choice]):
            assert row["scores"][task]["metric"] == PAPER_METRIC[task]
            return dict(row["scores"][task])
    raise LookupError(f"papers.json has no {objective} from {CHOICES[choice]} in HTD's Table 3")


def fine_tune_teacher(chosen: argparse.Namespace) -> dict[str, Best]:
    """The teacher on each task, from its own MNLI-tuned start; the trial that was kept of each."""
    grid = chosen.output / "teacher"
    command = [sys.executable, "finetune/grid.py", "--model", f"teacher={packaged_teacher()}"]
    command += ["--tasks", ",".join(("mnli", *TASKS)), "--start_from_task", "mnli"]
    command += ["--data", str(chosen.data), "--output", str(grid), "--save_models", "all"]
    command += ["--lr", "5e-5", "--batch_size", "16", "--epochs", "3", "--seeds", "1"]
    command += ["--max_train_rows", str(chosen.teacher_rows), "--precision", chosen.precision]
    command += ["--max_validation_rows", "1500", "--workers", str(chosen.workers)]
    execute(command)
    return {best.task: best for best in best_of_grid(read_trials([grid])) if best.task in TASKS}


def distil(teachers: Mapping[str, Best], chosen: argparse.Namespace) -> list[Best]:
    """Every objective from every choice of layers."""
    grid = chosen.output / "students"
    named = ",".join(f"{task}={best.trials[0].folder / 'model'}" for task, best in teachers.items())
    inits = ";".join(choice.replace("-", ",") for choice in CHOICES)
    command = [sys.executable, "finetune/grid.py", "--teacher", named, "--tasks", ",".join(TASKS)]
    command += ["--objective", ",".join(OBJECTIVES), "--init", inits, "--data", str(chosen.data)]
    command += ["--output", str(grid), "--lr", "1e-4", "--intermediate_lr", "3e-4"]
    command += ["--batch_size", "16", "--epochs", "2", "--intermediate_epochs", "2"]
    command += ["--max_train_rows", str(chosen.rows), "--seeds", str(chosen.seeds)]
    command += ["--weight_decay", "0.1"]  # the paper's, of RoBERTa
    execute([*command, "--precision", chosen.precision, "--workers", str(chosen.workers)])
    return best_of_grid(read_trials([grid]))


def values_of(cells: Sequence[Best]) -> Values:
    """Accuracy by seed: what the paper's columns hold."""
    found: Values = {}
    for cell in cells:
        objective, _, choice = cell.model.partition("@")
        scores = {t.seed: t.score(cell.split, PAPER_METRIC[cell.task]) for t in cell.trials}
        found[cell.task, objective, choice] = scores
    return found


def mean_of(scores: Mapping[int, float | None]) -> float:
    """In per cent; accuracies are always defined."""
    known = [score for score in scores.values() if score is not None]
    return 100 * sum(known) / len(known)


def table(cells: Sequence[Best], values: Values, teachers: Mapping[str, Best]) -> str:
    """Ours with the paper's in brackets, a row for each objective and choice."""
    rows = ["| objective | our layers (the paper's) | RTE acc | MRPC acc [headed F1 there] |"]
    rows.append("|---|---|---:|---:|")
    for objective, (ours, theirs) in itertools.product(OBJECTIVES, CHOICES.items()):
        shown = []
        for task in TASKS:
            scores = values[task, objective, ours]
            cell = paper_score(task, objective, ours)
            paper = f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.2f}"
            shown.append(f"{mean_of(scores):.1f} ± {deviation(scores):.1f} [{paper}]")
        layers = f"{ours.replace('-', ',')} ({theirs})"
        rows.append(f"| `{objective}` | {layers} | {' | '.join(shown)} |")
    means = [mean_of({0: teachers[t].trials[0].score(None, PAPER_METRIC[t])}) for t in TASKS]
    rows.append(f"| the teacher | | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    constant = {cell.task: cell.trials[0].result["majority"][cell.split] for cell in cells}
    shown = [f"{100 * constant[task][PAPER_METRIC[task]]:.1f}" for task in TASKS]
    rows.append(f"| always the same answer | | {' | '.join(shown)} |")
    return "\n".join(rows) + "\n"


def deviation(scores: Mapping[int, float | None]) -> float:
    """The sample standard deviation over seeds, in points."""
    known = torch.tensor([score for score in scores.values() if score is not None])
    return float(100 * known.std())


def compare(values: Values) -> dict[str, Any]:
    """Paired t-tests of choices within objectives and of objectives, and agreement of order."""
    cells = list(itertools.product(OBJECTIVES, CHOICES))
    tests = []
    for task in TASKS:
        for objective in OBJECTIVES:
            for a, b in itertools.combinations(CHOICES, 2):
                test = paired(values[task, objective, a], values[task, objective, b])
                tests.append({"task": task, "objective": objective, "a": a, "b": b, **test})
        for choice in CHOICES:
            for a, b in itertools.combinations(OBJECTIVES, 2):
                test = paired(values[task, a, choice], values[task, b, choice])
                tests.append({"task": task, "layers": choice, "a": a, "b": b, **test})
    order = {}
    for task in TASKS:
        ours = [mean_of(values[task, objective, choice]) for objective, choice in cells]
        theirs = [paper_score(task, *cell)["mean"] for cell in cells]
        found = spearmanr(ours, theirs)
        order[task] = {"spearman": float(found.statistic), "p": float(found.pvalue)}
    return {"tests": tests, "order": order}


def agreement(compared: Mapping[str, Any]) -> str:
    """The comparison in a table: how our 12 cells are ordered, and which tests are below 0.05."""
    rows = ["| task | Spearman of our cells with the paper's | p | tests with p < 0.05 |"]
    rows.append("|---|---:|---:|---|")
    # the tests are not corrected for their number, as the paper's are not: chance is said instead
    for task, found in compared["order"].items():
        own = [t for t in compared["tests"] if t["task"] == task and t["p"] is not None]
        significant = [
            f"{test.get('objective', test.get('layers'))}: {test['a']} - {test['b']} "
            f"{100 * test['difference']:+.1f}"
            for test in own
            if test["p"] < 0.05
        ]
        shown = f"{len(significant)} of {len(own)}, {0.05 * len(own):.1f} expected by chance"
        shown += f" ({'; '.join(significant)})" if significant else ""
        rows.append(f"| {task} | {found['spearman']:+.2f} | {found['p']:.3f} | {shown} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=1000, help="training rows of a task, at most")
    parser.add_argument("--teacher_rows", type=int, default=5000, help="the same for the teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA / "glue")
    parser.add_argument("--precision", default="bf16", help="fp32, bf16 or auto")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side")
    parser.add_argument("--output", type=Path, required=True, help="folder of the grids")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    teachers = fine_tune_teacher(chosen)
    cells = distil(teachers, chosen)
    values = values_of(cells)
    compared = compare(values)
    by_cell = {" ".join(key): scores for key, scores in values.items()}
    report = {
        **machine(torch.device("cpu")),
        "settings": {n: v for n, v in vars(chosen).items() if isinstance(v, int | str)},
        "accuracies": by_cell,
        **compared,
    }
    text = table(cells, values, teachers)
    write_report(chosen.results / "task-specific-study.json", report, text)
    write_report(chosen.results / "task-specific-agreement.json", compared, agreement(compared))
    print(text + "\n" + agreement(compared) + "\n" + json.dumps(compared["order"]))


if __name__ == "__main__":
    main()
