"""The page's heat maps of the grid, and what task-specific distillation gave."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from finetune.page.data import ABSENT, Study, spread, switch, title, when
from potstill.chart_axis import short
from potstill.charts import Dot, dot_rows, key
from potstill.page_frame import Cell, Column, Row, details, table

WARMTHS = 10  # steps of a heat map's colour


def heat_maps(study: Study) -> str:
    """Learning rate by batch size, a map for each model, a switch for the task."""
    grids = [grid for grid in study.part("grids") if grid["cells"]]
    tasks = [task for task in study.tasks if any(grid["task"] == task for grid in grids)]
    if not tasks:
        return '<p class="note">No grid: every model had one configuration.</p>'
    parts = [switch("grid", list(map(title, tasks)), "task")]
    for n, task in enumerate(tasks):
        of = [grid for grid in grids if grid["task"] == task]
        maps = "".join(_heat_map(study, grid) for grid in of)
        name = f"<h3>{escape(study.decided(task))}, %</h3>"
        parts.append(f'<div{when(grid=n)}>{name}<div class="cards">{maps}</div></div>')
    note = (
        "Colour: from the lowest to the highest mean of each model; ★: the one that stands for it."
    )
    return f'{"".join(parts)}<p class="note">{note}</p>'


def _heat_map(study: Study, grid: Mapping[str, Any]) -> str:
    """One model's grid as a coloured table: it is its own text, and keeps the page's colours."""
    cells = {(c["lr"], c["batch_size"], c["epochs"]): c for c in grid["cells"]}
    rates = sorted({rate for rate, _, _ in cells})
    others = sorted({(batch, epochs) for _, batch, epochs in cells})
    several = len({epochs for _, epochs in others}) > 1
    means = [c["mean"] for c in grid["cells"] if c["mean"] is not None] or [0.0]
    low, high = min(means), max(means)
    columns = [Column("learning rate", True)] + [
        Column(f"batch {batch}" + (f", {epochs} epochs" if several else ""), True)
        for batch, epochs in others
    ]
    score = study.score(grid["model"], grid["task"])  # of equal means, or few seeds, not all count
    best = score and (score["lr"], score["batch_size"], score["epochs"])
    rows = [
        Row(
            [
                short(rate),
                *(_heat(cells.get((rate, *o)), low, high, (rate, *o) == best) for o in others),
            ]
        )
        for rate in rates
    ]
    number = study.number(grid["model"])
    board = table(columns, rows, f"Grid of {grid['model']}")
    name = key(number, grid["model"])
    return f'<section class="card heat" data-series="{number}"><h4>{name}</h4>{board}</section>'


def _heat(cell: Mapping[str, Any] | None, low: float, high: float, best: bool) -> Cell:
    if cell is None or cell["mean"] is None:
        return Cell(ABSENT)
    warmth = round(WARMTHS * (cell["mean"] - low) / ((high - low) or 1))
    seeds = cell["seeds"]
    text = spread(cell["mean"], cell["std"]) + (" ★" if best else "")
    tip = f"{text}, {seeds if isinstance(seeds, int) else len(seeds)} seeds"
    return Cell(text, cell["mean"], f' data-heat="{warmth}" title="{escape(tip)}"')


def distillations(study: Study) -> str:
    """Task-specific distillation: objectives as rows, starts as marks, whiskers of one std."""
    found = study.part("distillations")
    tasks = list(dict.fromkeys(entry["task"] for entry in found))
    inits = list(dict.fromkeys(str(entry["init"]) for entry in found))
    legend = "".join(key(n, init) for n, init in enumerate(inits))
    parts = [switch("distilled", list(map(title, tasks)), "task")]
    for n, task in enumerate(tasks):
        of = [entry for entry in found if entry["task"] == task and entry["mean"] is not None]
        rows: dict[str, list[Dot]] = defaultdict(list)
        for entry in of:
            rows[entry["objective"]].append(_distilled_dot(entry, inits))
        chart = dot_rows(list(rows.items()), f"{study.decided(task)}, %")
        marks = f'<p class="legend">Student starts from teacher layers {legend}</p>'
        parts.append(
            f'<div{when(distilled=n)}><section class="card"><h3>{escape(title(task))}</h3>{marks}'
            f"{chart}{_distilled_table(of, inits)}</section></div>"
        )
    return "".join(parts)


def _distilled_dot(entry: Mapping[str, Any], inits: Sequence[str]) -> Dot:
    mean, std, init = entry["mean"], entry["std"], str(entry["init"])
    value = spread(mean, std)
    ends = (None, None) if std is None else (100 * (mean - std), 100 * (mean + std))
    tip = f"{entry['objective']} from {init}: {value} %"
    return Dot(value, 100 * mean, 0.0, tip, inits.index(init), *ends)


def _distilled_table(entries: Sequence[Mapping[str, Any]], inits: Sequence[str]) -> str:
    cells = {(e["objective"], str(e["init"])): e for e in entries}
    columns = [Column("objective"), *(Column(f"from {init}", True) for init in inits)]
    rows = []
    for objective in dict.fromkeys(entry["objective"] for entry in entries):
        row = [cells.get((objective, init)) for init in inits]
        found = [Cell(spread(e["mean"], e["std"]), e["mean"]) if e else ABSENT for e in row]
        rows.append(Row([objective, *found]))
    board = table(columns, rows, "Objective by start", sortable=True)
    return details("This chart as a table", board)
