"""Paired t-tests between models: are two models' scores of the same seeds different?

What is paired: the scores of equal seeds (order of rows, fresh head, dropout), each model at its
best configuration. HTD section 5 compares its objectives and initialisations by paired t-tests, but
does not say what it pairs. A test speaks of the draws of training alone: the validation rows are
the same for all seeds, and are those that the configuration was chosen on.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from scipy.stats import ttest_rel

Values = Mapping[Any, float | None]  # a score by seed, or by task and seed; None: undefined
ALL_TASKS = "all tasks together"


def paired(a: Values, b: Values) -> dict[str, Any]:
    """The two-sided paired t-test of `a` against `b` over the keys that both have.

    Returns:
        difference: mean of a - b, None without pairs; t and p: None where the test has no answer,
        and then `reason` says why; seeds: number of pairs.
    """
    pairs = [(a[seed], b[seed]) for seed in sorted(set(a) & set(b))]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    differences = [x - y for x, y in known]
    mean = math.fsum(differences) / len(known) if known else None
    found = {"difference": mean, "t": None, "p": None, "seeds": len(known), "reason": None}
    if len(known) < 2:
        return found | {"reason": "fewer than two seeds in common"}
    if math.isclose(min(differences), max(differences), rel_tol=1e-9, abs_tol=1e-12):
        same = "identical scores" if math.isclose(differences[0], 0, abs_tol=1e-12) else None
        return found | {"reason": same or "the difference is the same for every seed"}
    test = ttest_rel(*zip(*known, strict=True))
    return found | {"t": float(test.statistic), "p": float(test.pvalue)}


def paired_tests(
    scores: Sequence[Mapping[str, Any]], baseline: str | None = None
) -> list[dict[str, Any]]:
    """A test for each pair of models of every (task, metric) of `scores` (of report.json).

    Behind them, for pairs that share several tasks, one over the main metrics of all those tasks,
    paired by task and seed. It speaks of these very tasks: the seeds of one task are no independent
    evidence for tasks in general.

    Args:
        baseline: only pairs of this model, which then is `b`, with another.
    """
    grouped: dict[tuple[str, str], dict[str, dict[Any, float | None]]] = {}
    together: dict[str, dict[Any, float | None]] = {}
    mains: dict[str, str] = {}
    for score in scores:
        task, metric, model = score["task"], score["metric"], score["model"]
        values = {int(seed): value for seed, value in score["values"].items()}
        grouped.setdefault((task, metric), {})[model] = values
        if mains.setdefault(task, metric) == metric:  # a task's first is its main one
            by_task = {(task, seed): value for seed, value in values.items()}
            together.setdefault(model, {}).update(by_task)
    found = [
        {"task": task, "metric": metric, "a": a, "b": b, **paired(models[a], models[b])}
        for (task, metric), models in grouped.items()
        for a, b in _pairs(list(models), baseline)
    ]
    return found + [
        {"task": ALL_TASKS, "metric": "main", "a": a, "b": b, **paired(together[a], together[b])}
        for a, b in _pairs(list(together), baseline)
        if len({task for task, _ in together[a].keys() & together[b].keys()}) > 1
    ]


def _pairs(models: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    if baseline is None:
        return list(combinations(models, 2))
    return [(model, baseline) for model in models if model != baseline and baseline in models]
