"""The papers' own figures (papers.json) and averages, to stand beside ours.

papers.json holds the figures in per cent as printed, table by table; here they become fractions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean
from typing import Any

Scores = Mapping[tuple[str, str], float | None]  # (task, metric): mean, None if undefined


@dataclass(frozen=True)
class Average:
    """A paper's average: the plain mean over tasks, one metric of each."""

    name: str
    definition: str
    metrics: dict[str, str]  # task: metric

    def of(self, scores: Scores) -> float | None:
        """The average of a model's scores; None where one is missing: fewer are another average."""
        values = [scores.get(term) for term in self.metrics.items()]
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None


def _content() -> dict[str, Any]:
    text = (files("finetune.reporting") / "papers.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def averages() -> list[Average]:
    """The averages as the papers define them."""
    return [Average(**average) for average in _content()["averages"]]


def own_average(metrics: Mapping[str, str]) -> Average:
    """The mean of the main metrics over the tasks of a report, which is no paper's."""
    tasks = ", ".join(f"{task} {metric}" for task, metric in metrics.items())
    return Average(
        "All tasks here",
        f"No paper's: plain mean over the tasks of this report, the main metric of each ({tasks}).",
        dict(metrics),
    )


def paper_rows() -> list[dict[str, Any]]:
    """Every row of the papers' result tables, scores as fractions, as report.json has them."""
    return [
        _row(paper, table, row)
        for paper in _content()["papers"]
        for table in paper["tables"]
        for row in table["rows"]
    ]


def _row(
    paper: Mapping[str, Any], table: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any]:
    init = f" ({row['init']})" if "init" in row else ""
    return {
        "paper": paper["paper"],
        "citation": paper["citation"],
        "table": table["table"],
        "model": row.get("model") or row["objective"] + init,
        "objective": row["objective"].lower().replace(" ", "-") if "objective" in row else None,
        "init": row.get("init"),
        "scores": {
            task: _score(table["metrics"][task], value) for task, value in row["scores"].items()
        },
        "exact_match": _fraction(row.get("exact_match")),
        "average": _fraction(row["average"]),
        "average_name": table["average"],
        "training_flops": row.get("training_flops"),
        "setting": table["setting"],
        "differences": table["differences"],
        "note": row.get("note", ""),
    }


def _score(metric: str, value: float | list[float]) -> dict[str, Any]:
    mean, std = value if isinstance(value, list) else (value, None)
    return {"metric": metric, "mean": _fraction(mean), "std": _fraction(std)}


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 6)
