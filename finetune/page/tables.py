"""The page's tables: scores, averages, t-tests, the papers' rows beside ours, what failed."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from finetune.page.data import ABSENT, Study, percent, spread, switch, title, when
from finetune.page.summary import CHANCE, TOO_FEW, flops_cell, written_p
from potstill.chart_axis import short
from potstill.charts import key
from potstill.page_frame import Cell, Column, Row, details, table


def scores(study: Study) -> str:
    """Every model on every task, the answer of the commonest label below, and the averages."""
    headings = [(t, m) for t in study.tasks for m in study.metrics(t)]
    if not headings:
        return '<p class="note">No task yet.</p>'
    shown = [when(metrics=1) if m != study.main_metrics[t] else "" for t, m in headings]
    columns = [Column("model")] + [
        Column(f"{title(task)} {title(metric)}", True, attributes)
        for (task, metric), attributes in zip(headings, shown, strict=True)
    ]
    averages = study.known_averages
    columns += [Column(f"average: {average['name']}", True) for average in averages]
    rows = [_score_row(study, model, headings, shown, averages) for model in study.models]
    constant = {task["name"]: task.get("majorities") or {} for task in study.part("tasks")}
    foot = Row(
        ["always the commonest answer"]
        + [
            Cell(percent(constant[t].get(m)), attributes=a)
            for (t, m), a in zip(headings, shown, strict=True)
        ]
        + [""] * len(averages)
    )
    more = switch("metrics", ["main ones", "all"], "metrics") if any(shown) else ""
    board = table(columns, rows, "Scores of every model on every task", [foot], sortable=True)
    return more + board + _how(study) + _rows_of_tasks(study) + _all_figures(study)


def _score_row(
    study: Study,
    model: str,
    headings: Sequence[tuple[str, str]],
    shown: Sequence[str],
    averages: Sequence[Mapping[str, Any]],
) -> Row:
    number = study.number(model)
    cells = [Cell(model, html=key(number, model))]
    for (task, metric), attributes in zip(headings, shown, strict=True):
        cells.append(_score_cell(study, study.score(model, task, metric), attributes))
    for average in averages:
        value = average["values"].get(model)
        cells.append(Cell(percent(value), value))
    return Row(cells, f' data-series="{number}"')


def _score_cell(study: Study, score: Mapping[str, Any] | None, attributes: str) -> Cell:
    if score is None or score["mean"] is None:
        return Cell(ABSENT, attributes=attributes)
    seeds = len(score["values"])
    text = spread(score["mean"], score["std"])
    text += f" ({seeds} seed{'s' * (seeds != 1)})" if len(study.seeds) > 1 else ""
    shown = f"<b>{text}</b>" if score["mean"] == _best(study, score) else text
    attributes += f' title="{escape(_chosen(score))}"'
    return Cell(text, score["mean"], attributes, shown)


def _best(study: Study, like: Mapping[str, Any]) -> float | None:
    """The best student's score on that task by that metric."""
    found = (study.score(m, like["task"], like["metric"]) for m in study.models)
    of_students = (s["mean"] for s in found if s and s["model"] != study.teacher)
    return max((mean for mean in of_students if mean is not None), default=None)


def _chosen(score: Mapping[str, Any]) -> str:
    values = ", ".join(f"{s}: {percent(v, 2)}" for s, v in score["values"].items())
    setting = f"learning rate {short(score['lr'])}, batch {score['batch_size']}"
    return f"{setting}, {score['epochs']} epochs; by seed {values}"


def _how(study: Study) -> str:
    seeds = next(iter(study.seeds)) if len(study.seeds) == 1 else None
    over = "the seeds" if seeds is None else f"{seeds} seed{'s' * (seeds != 1)}"
    lines = [
        f"Per cent; mean ± sample standard deviation over {over}, of the best configuration of the "
        "grid, after its last epoch, on the validation rows. Bold: the best student."
    ]
    lines += [f"Average {a['name']}: {a['definition']}" for a in study.known_averages]
    known = [average["name"] for average in study.known_averages]
    absent = [a["name"] for a in study.part("averages") if a["name"] not in known]
    if absent:
        lines.append(f"No model here has all the tasks of the averages of {'; '.join(absent)}.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _rows_of_tasks(study: Study) -> str:
    names = ("training rows", "of the official", "validation rows")
    columns = [Column("task"), Column("decided by"), *(Column(name, True) for name in names)]
    rows = []
    for task in study.part("tasks"):
        counts, full = task["rows"], task.get("full_train_rows")
        decided = f"{title(task['metric'])}, {task['split']}"
        figures = [counts.get("train"), full, counts.get("validation")]
        texts = [ABSENT if figure is None else f"{figure:,}" for figure in figures]
        rows.append(Row([title(task["name"]), decided, *texts]))
    return details("Rows of each task", table(columns, rows, "Rows of each task"))


def _all_figures(study: Study) -> str:
    names = ["model", "task", "metric", "mean ± std", "learning rate, batch, epochs, by seed"]
    columns = [Column(name, number=name == "mean ± std") for name in names]
    rows = [
        Row(
            [
                score["model"],
                title(score["task"]),
                title(score["metric"]),
                spread(score["mean"], score["std"]),
                _chosen(score),
            ],
            f' data-series="{study.number(score["model"])}"',
        )
        for score in study.part("scores")
    ]
    return details("Every score by seed", table(columns, rows, "Every score by seed"))


def tests(study: Study) -> str:
    """The paired t-tests, a switch for the task."""
    found = study.part("tests")
    if not found:
        return '<p class="note">No pair of models shares enough seeds to be tested.</p>'
    names = ["task", "metric", "model a", "model b", "a − b, points", "t", "p", "seeds"]
    columns = [Column(n, number=n in names[4:]) for n in names] + [Column("says")]
    tasks = list(dict.fromkeys(test["task"] for test in found))
    rows = [_test_row(test, tasks.index(test["task"]) + 1) for test in found]
    tested = sum(test["p"] is not None for test in found)
    note = (
        f"Paired t-tests over equal seeds, {tested} of them: at p &lt; {CHANCE} about "
        f"{CHANCE * tested:.1f} would seem a difference by chance alone. “Not shown” is not “none”."
    )
    several = switch("test", ["all", *map(title, tasks)], "task") if len(tasks) > 1 else ""
    board = table(columns, rows, "Paired t-tests between models", sortable=True)
    return f'{several}{board}<p class="note">{note}</p>'


def _test_row(test: Mapping[str, Any], place: int) -> Row:
    difference, t, p = test["difference"], test["t"], test["p"]
    says = f"not tested: {test.get('reason') or TOO_FEW}" if p is None else "no difference shown"
    if p is not None and p < CHANCE:
        says = "a is better" if difference > 0 else "b is better"
    points = ABSENT if difference is None else f"{100 * difference:+.1f}"
    cells: list[Cell | str] = [title(test["task"]), title(test["metric"]), test["a"], test["b"]]
    cells += [Cell(points, difference), Cell(ABSENT if t is None else f"{t:.2f}", t)]
    cells += [Cell(ABSENT if p is None else written_p(p), p), Cell(str(test["seeds"]))]
    strong = f"<b>{says}</b>" if says.endswith("better") else ""
    return Row([*cells, Cell(says, html=strong)], when(test=f"0|{place}"))


def papers(study: Study) -> str:
    """The papers' rows, table by table, ours by the same metrics above them."""
    rows = study.part("papers")
    ordered = [
        (name, list(group))
        for name, group in groupby(rows, key=lambda r: f"{r['paper']}, table {r['table']}")
    ]
    if not ordered:
        return '<p class="note">No figures of papers were given.</p>'
    parts = [switch("paper", [name for name, _ in ordered], "paper")]
    for n, (name, group) in enumerate(ordered):
        parts.append(f"<div{when(paper=n)}>{_paper(study, name, group)}</div>")
    return "".join(parts)


def _paper(study: Study, name: str, group: Sequence[Mapping[str, Any]]) -> str:
    metrics = {t: s["metric"] for row in group for t, s in row["scores"].items()}
    shared = {t: m for t, m in metrics.items() if t in study.tasks} or metrics
    other = [t for t, m in shared.items() if study.main_metrics.get(t, m) != m]
    columns = [Column("model"), Column("from")]
    columns += [
        Column(f"{title(t)} {title(m)}{'*' * (t in other)}", True) for t, m in shared.items()
    ]
    columns += [Column("average", True), Column("training FLOPs", True)]
    averages = {a["name"]: a["values"] for a in study.part("averages")}
    same = averages.get(group[0].get("average_name"), {})
    lines = [_own_row(study, model, shared, same.get(model)) for model in study.models]
    lines += [_paper_row(row, shared) for row in group]
    marks = ", ".join(f"{title(t)} is read as {title(shared[t])}" for t in other)
    why = "the papers' column holds another metric than the one that decides here; ours are by it"
    note = f'<p class="note">* {escape(marks)}: {why} too.</p>' if marks else ""
    left_out = sorted(map(title, set(metrics) - set(shared)))
    out = f'<p class="note">Not shown, for we did not run: {escape(", ".join(left_out))}.</p>'
    board = table(columns, lines, f"Ours and {name}", sortable=True)
    return f"<h3>{escape(name)}</h3>{board}{note}{out if left_out else ''}{_said(group)}"


def _own_row(study: Study, model: str, metrics: Mapping[str, str], average: float | None) -> Row:
    number = study.number(model)
    cells: list[Cell | str] = [Cell(model, html=key(number, model)), "here"]
    for task, metric in metrics.items():
        score = study.score(model, task, metric) if task in study.tasks else None
        cells.append(_compared(score))
    cells += [Cell(percent(average), average), flops_cell(study.pretraining_flops(model))]
    return Row(cells, f' class="own" data-series="{number}"')


def _paper_row(row: Mapping[str, Any], metrics: Mapping[str, str]) -> Row:
    cells = [_compared(row["scores"].get(task)) for task in metrics]
    average = row.get("average")
    cells += [Cell(percent(average), average), flops_cell(row.get("training_flops"))]
    return Row([row["model"], row["paper"], *cells])


def _compared(score: Mapping[str, Any] | None) -> Cell:
    if score is None or score["mean"] is None:
        return Cell(ABSENT)
    return Cell(spread(score["mean"], score.get("std")), score["mean"])


def _said(group: Sequence[Mapping[str, Any]]) -> str:
    """Citation, setting, differences and notes of a paper's table, each once."""
    parts = []
    for name, heading in (
        *(("citation", "Source"), ("setting", "Their setting")),
        *(("differences", "What differs from ours"), ("note", "Note")),
    ):
        of_row = name == "note"
        texts = dict.fromkeys(
            f"{row['model']}: {row[name]}" if of_row else str(row[name])
            for row in group
            if row.get(name)
        )
        parts += [f"<dt>{heading}</dt><dd>{escape(text)}</dd>" for text in texts]
    return f"<dl>{''.join(parts)}</dl>"


def failed(study: Study) -> str:
    """The trials that did not end."""
    names = ("task", "model", "configuration", "reason")
    rows = [
        Row([title(trial["task"]), *(str(trial[name]) for name in names[1:])])
        for trial in study.part("failed")
    ]
    return table([Column(name) for name in names], rows, "Trials that failed")
