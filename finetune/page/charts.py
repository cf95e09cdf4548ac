"""The page's training curves: validation score by epoch, training loss by step."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finetune.page.data import ABSENT, Study, switch, title, when
from potstill.charts import Line, line_chart
from potstill.page_frame import Cell, Column, Row, details, table

LOSS_ROWS = 30  # of a loss curve, in its table


def curves(study: Study) -> str:
    """For each task: the validation score by epoch, and the training loss by step."""
    found = study.part("curves")
    tasks = [task for task in study.tasks if any(curve["task"] == task for curve in found)]
    if not tasks:
        return '<p class="note">No curves were logged.</p>'
    parts = [switch("curve", list(map(title, tasks)), "task")]
    for n, task in enumerate(tasks):
        runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for curve in found:
            if curve["task"] == task:
                runs[curve["model"]].append(curve)
        parts.append(f"<div{when(curve=n)}>{_curves_of(study, task, runs)}</div>")
    return "".join(parts)


def _curves_of(study: Study, task: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    metric = f"{study.decided(task)}, %"
    scores = {
        model: [_points(run["epochs"], "epoch", "score", 100.0) for run in of]
        for model, of in runs.items()
    }
    losses = {m: [_points(run["train"], "step", "loss") for run in of] for m, of in runs.items()}
    note = "Thick: mean over the seeds; thin: one seed each."
    several = any(len(of) > 1 for of in runs.values())
    return (
        '<div class="cards">'
        + _curve_card(
            study, f"{title(task)}: score on the validation rows", scores, "epoch", metric
        )
        + _curve_card(study, f"{title(task)}: training loss", losses, "step", "training loss")
        + f"</div>{f'<p class=note>{note}</p>' if several else ''}"
    )


def _points(
    entries: Sequence[Mapping[str, Any]], x: str, y: str, unit: float = 1.0
) -> dict[float, float]:
    return {entry[x]: unit * entry[y] for entry in entries if entry.get(y) is not None}


def _curve_card(
    study: Study, heading: str, runs: Mapping[str, Sequence[dict[float, float]]], x: str, y: str
) -> str:
    lines: list[Line] = []
    means: dict[str, dict[float, float]] = {}
    for model, of in runs.items():
        number = study.number(model)
        means[model] = mean = _mean_of(of)
        if len(of) > 1:
            lines += [Line(model, list(run.items()), number=number, thin=True) for run in of]
        tips = [f"{model}, {x} {at:g}: {value:.4g}" for at, value in mean.items()]
        lines.append(Line(model, list(mean.items()), x == "epoch", tips, number))
    chart = line_chart(lines, x, y, legend=False)
    told = _curve_table(study, means, x) if any(means.values()) else ""
    shown = f"<h3>{escape(heading)}</h3>{chart}{told}"
    return f'<section class="card">{shown}</section>'


def _mean_of(runs: Sequence[dict[float, float]]) -> dict[float, float]:
    """The mean over seeds, at the places that all of them have."""
    shared = sorted(set.intersection(*(set(run) for run in runs)))
    return {at: statistics.fmean(run[at] for run in runs) for at in shared}


def _curve_table(study: Study, means: Mapping[str, dict[float, float]], x: str) -> str:
    places = sorted({at for mean in means.values() for at in mean})
    stride = -(-len(places) // LOSS_ROWS) or 1
    columns = [Column(x, True)] + [
        Column(model, True, f' data-series="{study.number(model)}"') for model in means
    ]
    rows = [
        Row([f"{at:g}"] + [_curve_cell(study, model, mean, at) for model, mean in means.items()])
        for at in places[stride - 1 :: stride]
    ]
    every = f", one of {stride} logged {x}s" if stride > 1 else ""
    return details(f"This chart as a table{every}", table(columns, rows, f"By {x}"))


def _curve_cell(study: Study, model: str, mean: dict[float, float], at: float) -> Cell:
    text = f"{mean[at]:.4g}" if at in mean else ABSENT
    return Cell(text, attributes=f' data-series="{study.number(model)}"')
