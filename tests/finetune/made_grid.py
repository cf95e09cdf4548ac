"""Grids made by hand: result.json files of a real form with scores that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Scores = Mapping[str, Mapping[str, float | None]]  # split: metric: value

MAIN = {"cola": "mcc", "mrpc": "f1", "rte": "accuracy", "sst2": "accuracy", "mnli": "accuracy"}


def write_json(path: Path, value: Any) -> None:
    """JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def result(
    task: str,
    scores: Mapping[str, float | None],
    lr: float = 1e-5,
    batch_size: int = 16,
    epochs: int = 2,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """A result.json; the epoch before the last scores 0.9, so that taking the best one shows."""
    first, *_ = scores
    entries = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "loss": {"validation": 1 / epoch},
            "scores": {"validation": dict(scores) if epoch == epochs else {**scores, first: 0.9}},
        }
        for epoch in range(1, epochs + 1)
    ]
    settings = {
        "model": "models/any",
        "model_sha256": "f" * 64,
        "data_sha256": "d" * 64,
        "task": task,
        "max_train_rows": None,
        "max_validation_rows": None,
        "max_length": 128,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "seed": seed,
        "precision": "fp32",
    }
    return {
        "model": "models/any",
        "task": task,
        "settings": settings | changes.pop("settings", {}),
        "potstill": {},
        "parameters": 1000,
        "rows": {"train": 2000, "validation": 50},
        "main": {"split": "validation", "metric": first},
        "epochs": entries,
        "last": entries[-1],
        "best": entries[0],
        "majority": {"validation": {name: 0.5 for name in scores}},
        **changes,
    }


def write_trial(grid: Path, model: str, result: Mapping[str, Any]) -> Path:
    """A finished trial of a grid."""
    settings = result["settings"]
    name = "-".join(str(settings[key]) for key in ("lr", "batch_size", "epochs", "seed"))
    folder = grid / "trials" / result["task"] / model / name
    write_json(folder / "result.json", result)
    return folder


def write_grid(grid: Path, models: Sequence[str], **facts: Any) -> Path:
    """The grid.json of a grid without trials."""
    entries = {name: {"path": f"models/{name}", "sha256": name * 8} for name in models}
    write_json(grid / "grid.json", {"models": entries, **facts})
    return grid


def write_scores(
    grid: Path, model: str, task: str, scores: Mapping[float, Sequence[float | None]], **more: Any
) -> None:
    """Trials by learning rate: the main score of seed 0, 1, …"""
    for lr, values in scores.items():
        for seed, value in enumerate(values):
            write_trial(grid, model, result(task, {MAIN[task]: value}, lr=lr, seed=seed, **more))
