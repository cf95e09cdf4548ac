"""The page's scatter charts: score against size, speed and compute."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finetune.page.data import ABSENT, Study, spread, switch, when
from potstill.chart_axis import short
from potstill.charts import Dot, scatter
from potstill.page_frame import Cell, Column, Row, details, table

Values = Mapping[str, tuple[float | None, float | None]]  # mean and deviation by model


@dataclass(frozen=True)
class Cost:
    """What a model costs, in one unit; None where it is not known."""

    name: str
    values: Mapping[str, float | None]
    logarithmic: bool = False


def against_costs(study: Study) -> str:
    """A card for each kind of cost that is known; one switch for the score of all of them."""
    known = {name: costs for name, costs in _costs(study).items() if costs}
    measures = _measures(study)
    if not known or not measures:
        return '<p class="note">No cost of a scored model is known.</p>'
    cards = "".join(_card(study, name, costs, measures) for name, costs in known.items())
    line = '<p class="note">The dashed line is the teacher\'s score.</p>' if study.teacher else ""
    return f'{switch("score", list(measures), "score")}<div class="cards">{cards}</div>{line}'


def _costs(study: Study) -> dict[str, list[Cost]]:
    def fact(label: str, field: str, logarithmic: bool = False) -> Cost:
        return Cost(label, {m: study.facts(m).get(field) for m in study.models}, logarithmic)

    made = {model: study.pretraining_flops(model) for model in study.models}
    speeds = [
        Cost(f"ms, {kind}", {model: study.latency(model, kind) for model in study.models})
        for kind in study.latencies
    ]
    groups = {
        "size": [fact("parameters", "parameters"), fact("bytes on disk", "size_bytes")],
        "latency": speeds,
        "FLOPs": [
            Cost("FLOPs of the distillation", made, logarithmic=True),
            fact("FLOPs of a row of 128 tokens", "flops_per_row", logarithmic=True),
        ],
    }
    return {name: [c for c in costs if any(c.values.values())] for name, costs in groups.items()}


def _measures(study: Study) -> dict[str, Values]:
    """What is drawn upwards: the overall score, then every task."""
    found: dict[str, Values] = {}
    if study.overall and len(study.tasks) > 1:
        found[study.overall.name] = {m: (study.overall.values.get(m), None) for m in study.models}
    for task in study.tasks:
        scores = {model: study.score(model, task) for model in study.models}
        found[study.decided(task)] = {m: (s["mean"], s["std"]) for m, s in scores.items() if s}
    return {n: v for n, v in found.items() if any(mean is not None for mean, _ in v.values())}


def _card(study: Study, name: str, costs: list[Cost], measures: Mapping[str, Values]) -> str:
    parts = [f"<h3>Score against {name}</h3>", switch(name, [cost.name for cost in costs], "by")]
    for c, cost in enumerate(costs):
        for m, (measure, values) in enumerate(measures.items()):
            dots = list(_dots(study, measure, values, cost))
            of_teacher = values.get(study.teacher or "", (None, None))[0]
            level = None if of_teacher is None else 100 * of_teacher
            chart = scatter(dots, cost.name, f"{measure}, %", cost.logarithmic, level)
            parts.append(f"<div{when(**{name: c, 'score': m})}>{chart}</div>")
        parts.append(f"<div{when(**{name: c})}>{_table(study, cost, measures)}</div>")
    return f'<section class="card">{"".join(parts)}</section>'


def _dots(study: Study, measure: str, values: Values, cost: Cost) -> Iterator[Dot]:
    for model, (mean, std) in values.items():
        at = cost.values[model]
        if mean is None or not at:
            continue
        name = study.marked(model)
        tip = f"{name}: {measure} {spread(mean, std)} %, {short(at)} {cost.name}"
        ends = (None, None) if std is None else (100 * (mean - std), 100 * (mean + std))
        yield Dot(name, at, 100 * mean, tip, study.number(model), *ends)


def _table(study: Study, cost: Cost, measures: Mapping[str, Values]) -> str:
    columns = [Column("model"), Column(cost.name, True), *(Column(n, True) for n in measures)]
    rows = []
    for model in study.models:
        at = cost.values[model]
        scores = [values.get(model, (None, None)) for values in measures.values()]
        cells = [Cell(spread(*score), score[0]) for score in scores]
        attributes = f' data-series="{study.number(model)}"'
        rows.append(Row([model, Cell(short(at) if at else ABSENT, at), *cells], attributes))
    return details("These points as a table", table(columns, rows, cost.name, sortable=True))
