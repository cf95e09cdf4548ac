"""The demo's numbers: read from what the programs left, checked, and shown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from potstill.console import say
from potstill.errors import PotstillError

CLOSE = 1e-5  # float32: the reopened student's logits against the trainer's
KEPT = ("cpu", "gpu", "cpus", "platform", "python", "commit")


def collect(
    output: Path, models: Sequence[str], seeds: int, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        output: the demo's folder. models: names of the fine-tuned models, in their order.
        seeds: how many times each was fine-tuned.
        records: of the stages, by name: command and seconds.

    Raises:
        PotstillError: the exported student is not the one that was trained.
    """
    manifest = read(output / "shards" / "manifest.json")
    settings = read(output / "student" / "config.json")["settings"]
    environment = read(output / "student" / "environment.json")
    scores = {
        name: [
            read(output / "finetuned" / f"{slug(name)}-{seed}" / "result.json")
            for seed in range(seeds)
        ]
        for name in models
    }
    rows = scores[models[0]][0]["rows"]
    corpus = (output / "text" / "corpus.jsonl").read_bytes()
    return {
        "models": [row_of(name, results) for name, results in scores.items()]
        + [majority_row(scores[models[0]][0])],
        "note": note(rows, seeds),
        "rows": rows,
        "corpus": {
            "megabytes": len(corpus) / 1e6,
            "documents": corpus.count(b"\n"),
            "tokens": sum(split["tokens"] for split in manifest["splits"].values()),
        },
        "teacher": shape(output / "teacher" / "student"),
        "student": shape(output / "student" / "student"),
        "objective": settings["objective"],
        "init": start_of(settings["init"]),
        "ranks": environment["ranks"],
        "export": check_export(output),
        "curves": {run: curves(output / run / "metrics.jsonl") for run in ("teacher", "student")},
        "stages": [{"title": name, **record} for name, record in records.items()],
        "environment": {name: environment.get(name) for name in KEPT},
    }


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def slug(name: str) -> str:
    """A model's name as that of a folder."""
    return name.replace(" ", "-")


def row_of(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A model's row of the table: means over seeds of the scores after the last epoch."""
    scores = [result["last"]["scores"][result["main"]["split"]] for result in results]
    means = {metric: mean(of_seed[metric] for of_seed in scores) for metric in scores[0]}
    accuracies = [of_seed["accuracy"] for of_seed in scores]
    return {"name": name, "parameters": results[0]["parameters"], **means, "seeds": accuracies}


def majority_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """What always giving the same answer scores."""
    scores = result["majority"][result["main"]["split"]]
    return {"name": "always the same answer", "parameters": 0, **scores}


def note(rows: Mapping[str, int], seeds: int) -> str:
    """What the table's figures are and are not."""
    error = 50 / rows["validation"] ** 0.5  # in points, of an accuracy of one half
    return (
        "The task: from which of six libraries does the first sentence of a docstring come? "
        f"{rows['train']} sentences to train on, {rows['validation']} to score on, balanced, the "
        "library's name taken out, all from modules that pretraining never saw. Means over "
        f"{seeds} seeds of fine-tuning, the last epoch; the choice of sentences to score on "
        f"alone leaves a standard error of up to {error:.1f} points. If the distilled "
        "student is ahead of the random one, part of it comes from the teacher's layers with which "
        "it starts. The figures say nothing about GLUE or about larger models: the teacher had a "
        "minute or two of training."
    )


def start_of(init: str) -> str:
    """Where the student's weights came from, in words."""
    return "random weights" if init == "random" else f"copies of some of its layers ({init})"


def shape(folder: Path) -> str:
    """A model's shape in words."""
    config = read(folder / "config.json")
    return f"{config['num_hidden_layers']} layers x {config['hidden_size']}"


def curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of the training and validation lines."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        kind: [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
        for kind in ("train", "validation")
    }


def check_export(output: Path) -> dict[str, Any]:
    """Open the student as anybody would, and hold it against what the trainer wrote down.

    Raises:
        PotstillError: weights are missing, or logits not finite or not the trainer's.
    """
    lines = (output / "student" / "metrics.jsonl").read_text().splitlines()
    exports = [line for line in map(json.loads, lines) if line.get("event") == "export"]
    difference = exports[-1]["max_abs_difference"]
    folder = output / "student" / "student"
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(f"Return a copy of the {tokenizer.mask_token}.", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**encoded).logits
    faults = {
        "weights are missing": bool(report["missing_keys"] or report["unexpected_keys"]),
        "logits are not finite": not bool(logits.isfinite().all()),
        f"its logits differ by {difference} from the trainer's": difference > CLOSE,
    }
    found = [fault for fault, is_so in faults.items() if is_so]
    if found:
        raise PotstillError(f"{folder}: {'; '.join(found)}; this is a bug, please report it")
    return {"max_abs_difference": difference, "opened_with": type(model).__name__}


def show(results: Mapping[str, Any], output: Path) -> None:
    """The end of the demo: table and paths."""
    say(f"\n{'model':24}{'parameters':>12}{'accuracy':>10}{'macro F1':>10}")
    for row in results["models"]:
        scores = f"{100 * row['accuracy']:>9.1f}%{100 * row['macro_f1']:>9.1f}%"
        say(f"{row['name']:24}{row['parameters']:>12,}{scores}")
    export = results["export"]
    say(
        f"\nThe exported student opens as {export['opened_with']}; its logits differ by at most "
        f"{export['max_abs_difference']:.1e} from those it had in training.\n\n"
        f"student  {output / 'student' / 'student'}\n"
        f"numbers  {output / 'results.json'}\n"
        f"page     {output / 'report.html'}"
    )
