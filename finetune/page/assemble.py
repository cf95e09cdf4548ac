"""The report's page: one HTML file for whoever asks which student is good enough.

It fetches nothing, works without its script (everything is then shown), in the dark, on a phone and
on paper. `report` is the content of report.json; all of its text is escaped.
"""

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from finetune.page import charts, costs, grids, tables
from finetune.page.data import Study
from finetune.page.summary import models_table, summary
from potstill.charts import key
from potstill.page_frame import Column, Row, details, frame, table


def page(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: title, date, environment, notes, models, tasks, scores (fractions of 1), averages,
            tests, grids, curves, papers, distillations, failed. A part that is missing is empty.
    """
    study = Study(report)
    own = files("finetune.page")
    return frame(
        str(report.get("title") or "Fine-tuning report"),
        _body(study),
        style=(own / "page.css").read_text(encoding="utf-8"),
        script=(own / "page.js").read_text(encoding="utf-8"),
    )


def _body(study: Study) -> str:
    report = study.report
    heading = f"<h1>{escape(str(report.get('title') or 'Fine-tuning report'))}</h1>"
    date = f'<p class="note">{escape(str(report["date"]))}</p>' if report.get("date") else ""
    sections = [
        ("sizes", "Models", models_table(study) + costs.against_costs(study)),
        ("scores", "Scores", tables.scores(study)),
        ("tests", "Is the difference real?", tables.tests(study)),
        ("curves", "Training curves", charts.curves(study)),
        ("grid", "The grid", grids.heat_maps(study)),
        ("papers", "Beside the papers", tables.papers(study)),
    ]
    if study.part("distillations"):
        place = [name for name, _, _ in sections].index("papers")
        shown = grids.distillations(study)
        sections.insert(place, ("distilled", "Task-specific distillation", shown))
    if study.part("failed"):
        sections.append(("failed", "Trials that failed", tables.failed(study)))
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    parts = [
        f'<section id="{name}"><h2>{escape(text)}</h2>{content}</section>'
        for name, text, content in sections
    ]
    return (
        f'<header>{heading}{date}</header><main>{summary(study)}<nav aria-label="Sections">{links}'
        f"</nav>{_legend(study)}{''.join(parts)}{_environment(study)}</main>"
        '<div id="tip" role="tooltip" hidden></div>'
    )


def _environment(study: Study) -> str:
    facts = study.report.get("environment") or {}
    if not facts:
        return ""
    known = {name: value for name, value in facts.items() if value is not None}
    rows = [Row([name.replace("_", " "), _fact(value)]) for name, value in known.items()]
    board = table([Column("what"), Column("found")], rows, "Machine")
    return details("Machine and versions that made this report", board)


def _fact(value: object) -> str:
    """A fact as text; of several the names with their values."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)


def _legend(study: Study) -> str:
    """The models' marks; each is a button that hides and shows its model on the whole page."""
    buttons = "".join(
        f'<button type="button" data-toggle="{n}" aria-pressed="true">{key(n, name)}</button>'
        for n, name in enumerate(study.models)
    )
    every = "".join(
        f'<button type="button" data-every="{act}">{act} all</button>' for act in ("show", "hide")
    )
    return (
        f'<div class="models" role="group" aria-label="Models shown"><b>models</b>'
        f"{every if len(study.models) > 6 else ''}{buttons}</div>"
    )
