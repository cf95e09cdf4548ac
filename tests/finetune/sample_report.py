"""A report of made-up figures with every part that a real one has, for the tests of the page."""

import random
import statistics
from typing import Any

TASKS = {"cola": "mcc", "sst2": "accuracy", "mrpc": "f1", "stsb": "pearson", "rte": "accuracy"}
SECOND = {"cola": "accuracy", "mrpc": "accuracy", "stsb": "spearman"}
MODELS = {"teacher": 0.80, "att-mse 6x384": 0.775, "hid-seq 6x384": 0.76, "random 3x384": 0.66}
RATES, BATCHES, SEEDS = (3e-5, 8e-5), (16, 32), (0, 1, 2)
FAST, SLOW = "torch fp32, batch 1", "onnxruntime fp32, batch 32"


def sample_report(
    models: dict[str, float] | None = None, seeds: tuple[int, ...] = SEEDS
) -> dict[str, Any]:
    """The report of `models`, name and about its score; the same call gives the same figures."""
    models = MODELS if models is None else models
    dice = random.Random(0)
    scores = [
        _score(dice, m, level, t, metric, seeds)
        for m, level in models.items()
        for t, main in TASKS.items()
        for metric in dict.fromkeys((main, SECOND.get(t, main)))
    ]
    return {
        "title": "GLUE with students of 6 layers",
        "date": "2026-01-02",
        "environment": {"processor": "2 cores", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        "notes": ["SST-2: 8,000 of 67,349 training rows.", "RTE has 277 validation rows."],
        "models": [_model(n, name, level) for n, (name, level) in enumerate(models.items())],
        "tasks": [_task(task, metric) for task, metric in TASKS.items()],
        "scores": scores,
        "averages": [_average("GLUE-5", scores, models), _average("HTD", [], models)],
        "tests": [_test(dice, t, a, b) for t in TASKS for a, b in _pairs(list(models))],
        "grids": [_grid(dice, m, level, t) for m, level in models.items() for t in TASKS],
        "curves": [
            _curve(dice, m, level, t, s)
            for m, level in models.items()
            for t in TASKS
            for s in seeds
        ],
        "papers": _papers(),
        "distillations": [
            _distilled(dice, objective, init, task)
            for task in ("mrpc", "rte")
            for objective in ("att-mse", "att-kl+val-kl", "hid-cls", "kd")
            for init in ("2,4,6", "1,4,6", "1,2,3")
        ],
        "failed": [
            {"task": "rte", "model": "random 3x384", "configuration": "8e-05-32-3-2", "reason": "?"}
        ],
    }


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]


def _score(
    dice: random.Random, model: str, level: float, task: str, metric: str, seeds: tuple[int, ...]
) -> dict[str, Any]:
    values = {str(seed): round(level + dice.uniform(-0.01, 0.01), 4) for seed in seeds}
    found = list(values.values())
    return {
        "model": model,
        "task": task,
        "metric": metric,
        "mean": statistics.fmean(found),
        "std": statistics.stdev(found) if len(found) > 1 else None,
        "values": values,
        "lr": dice.choice(RATES),
        "batch_size": dice.choice(BATCHES),
        "epochs": 3,
    }


def _model(n: int, name: str, level: float) -> dict[str, Any]:
    size = int(22.7e6 / (1 + 0.4 * n))
    latency = {FAST: 9.5 / (1 + 0.3 * n), SLOW: 180.0 / (1 + 0.35 * n)}
    return {
        "name": name,
        "parameters": size,
        "size_bytes": 4 * size,
        "flops_per_row": 2.8e9 / (1 + 0.4 * n),
        "latency_ms": latency,
        "pretraining": {"objective": name, "tokens": 4e7, "flops": 1e15 * n} if n else None,
    }


def _task(task: str, metric: str) -> dict[str, Any]:
    return {
        "name": task,
        "metric": metric,
        "split": "validation",
        "rows": {"train": 2490, "validation": 277},
        "full_train_rows": 8551,
        "majority": 0.5271,
        "majorities": {SECOND.get(task, metric): 0.612, metric: 0.5271},
    }


def _average(name: str, scores: list[dict[str, Any]], models: dict[str, float]) -> dict[str, Any]:
    values = {
        m: statistics.fmean(s["mean"] for s in scores if s["model"] == m) if scores else None
        for m in models
    }
    return {"name": name, "definition": "A plain mean.", "tasks": list(TASKS), "values": values}


def _test(dice: random.Random, task: str, a: str, b: str) -> dict[str, Any]:
    p = dice.choice((0.0004, 0.012, 0.21, 0.6))
    difference = dice.uniform(0, 0.03)
    return {
        "task": task,
        "metric": TASKS[task],
        "a": a,
        "b": b,
        "seeds": 3,
        "reason": None,
        "difference": difference,
        "t": 3.1,
        "p": p,
    }


def _grid(dice: random.Random, model: str, level: float, task: str) -> dict[str, Any]:
    cells = [
        {
            "lr": rate,
            "batch_size": batch,
            "epochs": 3,
            "std": 0.004,
            "seeds": 3,
            "mean": level + dice.uniform(-0.03, 0.0),
        }
        for rate in RATES
        for batch in BATCHES
    ]
    return {"model": model, "task": task, "cells": cells}


def _curve(dice: random.Random, model: str, level: float, task: str, seed: int) -> dict[str, Any]:
    epochs = [
        {"epoch": n, "loss": 0.7 / n, "score": level - 0.1 / n + dice.uniform(-0.01, 0.01)}
        for n in (1, 2, 3)
    ]
    train = [
        {"step": step, "loss": 0.7 * 0.99 ** (step / 4) + dice.uniform(0, 0.05)}
        for step in range(10, 470, 10)
    ]
    return {
        "model": model,
        "task": task,
        "lr": 3e-5,
        "batch_size": 16,
        "seed": seed,
        "epochs": epochs,
        "train": train,
    }


def _papers() -> list[dict[str, Any]]:
    """Two tables; in the first CoLA is an accuracy, though Matthews decides here."""

    def row(table: str, model: str, metric: str, level: float) -> dict[str, Any]:
        metrics = TASKS | {"cola": metric, "qnli": "accuracy"}
        del metrics["stsb"]
        return {
            "paper": "HTD",
            "citation": "Wang et al.: How to Distill your BERT. ACL 2023.",
            "table": table,
            "model": model,
            "scores": {t: {"metric": m, "mean": level, "std": 0.01} for t, m in metrics.items()},
            "average": level,
            "average_name": "HTD",
            "training_flops": 1.55e19 if table == "2" else None,
            "setting": "RoBERTa-base to 3 layers, 10 epochs, 4 seeds, dev sets.",
            "differences": "Their teacher has 12 layers of width 768, ours 6 of 384.",
            "note": "CoLA is read as an accuracy." if table == "1" else "",
        }

    return [
        row("1", "Vanilla KD", "accuracy", 0.691),
        row("1", "Att-MSE", "accuracy", 0.72),
        row("2", "Att-MSE", "mcc", 0.45),
    ]


def _distilled(dice: random.Random, objective: str, init: str, task: str) -> dict[str, Any]:
    mean = 0.6 + dice.uniform(0, 0.1)
    return {
        "objective": objective,
        "init": init,
        "task": task,
        "mean": mean,
        "std": dice.uniform(0.002, 0.015),
        "seeds": 3,
    }
