"""Put grids and runs of fine-tuning side by side: tables, tests, costs, the papers' rows, a page.

python finetune/report.py runs/grid --output report/
python finetune/report.py runs/grid runs/rte --output report/ --baseline teacher --no_latency
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.classifier import fingerprint
from finetune.page.assemble import page
from finetune.reporting.costs import STORE, costs
from finetune.reporting.data import Report, add_costs, build
from finetune.reporting.latency import has_onnx
from finetune.reporting.selection import Trial, is_grid, read_grid, read_trials
from finetune.reporting.tables import csv_text, markdown
from potstill.console import program, say
from potstill.errors import InputError
from potstill.files import is_leftover, write_json, write_text
from potstill.text import fits_a_line

JSON, MARKDOWN, CSV, PAGE = "report.json", "report.md", "report.csv", "report.html"
EPILOG = """
OUTPUT/report.md and report.html are for people, report.json and report.csv for programs.
OUTPUT/costs.json keeps the latencies: a second report of these models does not measure them again.
Latency in onnxruntime needs `pip install -e .[report]`. Time models where nothing else runs.
"""


@dataclass(frozen=True)
class Settings:
    """What to report, and where to."""

    folders: tuple[Path, ...]
    output: Path
    title: str
    models: Mapping[str, Path]
    baseline: str | None
    teacher: str | None
    latency: bool
    threads: int


def parse(arguments: Sequence[str] | None) -> Settings:
    """Read the command line (`None`: of this process).

    Raises:
        InputError: a value makes no sense.
        SystemExit: argparse found bad usage (status 2) or was asked for help (status 0).
    """
    given = _parser().parse_args(None if arguments is None else list(arguments))
    for text in (*given.folders, given.output, given.title, *given.models):
        if not fits_a_line(text):
            raise InputError(f"{text!r}: a line break or another control character; rename it")
    if not 1 <= given.threads <= 10_000:
        raise InputError(f"--threads {given.threads}: give a number from 1 to 10000")
    for folder in given.folders:
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder; give the --output of a grid or a run")
    return Settings(
        folders=tuple(dict.fromkeys(map(Path, given.folders))),
        output=Path(given.output),
        title=given.title,
        models=dict(map(_named, given.models)),
        baseline=given.baseline,
        teacher=given.teacher,
        latency=not given.no_latency,
        threads=given.threads,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tables and a page of fine-tuning results: best of grid, means over seeds, "
        "paired t-tests, costs, and the papers' figures beside them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="RUN_OR_GRID",
        help="output folders of grid.py, run.py or distill.py",
    )
    add("--output", required=True, metavar="DIR", help="folder of the report")
    add("--title", default="Fine-tuning results", help="heading of tables and page")
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="where models lie now, for their costs; by default where they were fine-tuned from",
    )
    add(
        "--baseline",
        metavar="MODEL",
        help="t-tests of this model with every other one; by default of all pairs",
    )
    add(
        "--teacher",
        metavar="MODEL",
        help="the page measures the others by it; default: the only one with teacher in its name",
    )
    add("--no_latency", action="store_true", help="do not time the models")
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads of the timing (default: %(default)s)",
    )
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not os.path.isdir(folder):
        raise InputError(f"--models {text}: no such folder; give NAME=DIR")
    return name, Path(folder)


def check_output(output: Path) -> None:
    """Refuse an output that is no folder, cannot be written or holds something else.

    Raises:
        InputError: says which.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: no folder; give another one")
    known = {JSON, MARKDOWN, CSV, PAGE, STORE}
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if not names & known and any(not is_leftover(output / name) for name in names):
        raise InputError(f"--output {output}: not empty and no report; give a new folder")
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: {there} cannot be written; give another folder")


def model_folders(settings: Settings, trials: Sequence[Trial]) -> dict[str, Path]:
    """Where each model lies: as told, as its grid says, or as its run was told.

    One that is not there any more, or holds other files than were fine-tuned, is left out.

    Raises:
        InputError: a folder of --models holds another model than the one that was fine-tuned.
    """
    found, tuned = _own_models(settings, trials)
    there = {name: folder for name, folder in found.items() if folder.is_dir()}
    changed = [name for name in there if name in tuned and fingerprint(there[name]) != tuned[name]]
    for name in changed:
        if name in settings.models:
            raise InputError(
                f"--models {name}={there[name]}: another model than the one that was fine-tuned; "
                "give that one's folder"
            )
    return {name: folder for name, folder in there.items() if name not in changed}


def _own_models(
    settings: Settings, trials: Sequence[Trial]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders by name; of all models but those distilled on the task also the fingerprint."""
    found: dict[str, Path] = {}
    tuned: dict[str, str] = {}
    for trial in reversed(trials):
        if "distillation" in trial.result:  # its "model" is the teacher
            found[trial.model] = trial.folder / "model"
        else:
            found[trial.model] = Path(trial.result["model"])
            tuned[trial.model] = str(trial.result["settings"].get("model_sha256"))
    for folder in filter(is_grid, settings.folders):
        # with a start from another task the trials' own models are tuned already
        for name, model in read_grid(folder)["models"].items():
            if name in tuned and "path" in model:
                found[name], tuned[name] = Path(model["path"]), model["sha256"]
    return found | dict(settings.models), tuned


def check_models(settings: Settings, names: Sequence[str]) -> None:
    """Refuse a --models, --baseline or --teacher that no trial has.

    Raises:
        InputError: names it.
    """
    asked = [("baseline", settings.baseline), ("teacher", settings.teacher)]
    for flag, name in [*(("models", name) for name in settings.models), *asked]:
        if name is not None and name not in names:
            raise InputError(f"--{flag} {name}: no such model; there are {', '.join(names)}")


def make(settings: Settings) -> Report:
    """The report of the settings' folders, with costs.

    Raises:
        InputError: a folder is neither grid nor run, or a model or name cannot be used.
        TrainingError: an exported model answers otherwise than the one in torch.
    """
    check_output(settings.output)
    trials = read_trials(settings.folders)
    names = list(dict.fromkeys(trial.model for trial in trials))
    check_models(settings, names)
    report = build(settings.folders, trials, settings.title, settings.baseline, settings.teacher)
    folders = model_folders(settings, trials)
    found = costs(folders, settings.output, settings.threads, settings.latency)
    return add_costs(report, found, _cost_notes(settings, names, folders))


def _cost_notes(settings: Settings, names: Sequence[str], folders: Mapping[str, Path]) -> list[str]:
    """What was measured how, and what was not."""
    notes = []
    if settings.latency and folders:
        notes.append(
            "Latency: median milliseconds for a batch of rows of 128 tokens, models timed in turn, "
            f"CPU threads: {settings.threads}."
        )
    if settings.latency and not has_onnx():
        notes.append("onnxruntime: not measured: pip install -e .[report].")
    missing = [name for name in names if name not in folders]
    if missing:
        notes.append(
            "No size, FLOPs and latency, for the model's folder is not there, or holds other files "
            f"than were fine-tuned: {', '.join(missing)} (--models NAME=DIR says where it lies)."
        )
    return notes


def write(report: Report, output: Path) -> None:
    """Write all forms of a report, each file whole or not at all."""
    page_text, tables = page(report), markdown(report)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, page_text)
    write_text(output / MARKDOWN, tables)
    write_text(output / CSV, csv_text(report))
    write_json(output / JSON, report)


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Report as the command line says; `arguments` stands in for it."""
    settings = parse(arguments)
    report = make(settings)
    write(report, settings.output)
    say(_line(report))
    for name in (MARKDOWN, PAGE, CSV, JSON):
        say(f"  {settings.output / name}")


def _line(report: Mapping[str, Any]) -> str:
    counts = {name: len(report[name]) for name in ("models", "tasks", "tests", "failed")}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) + ":"


if __name__ == "__main__":
    main()
