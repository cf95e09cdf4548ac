"""The top of the page: which student is good enough, in plain words and in one table."""

from collections.abc import Callable, Iterator, Mapping
from html import escape

from finetune.page.data import ABSENT, Overall, Study, percent, times, title
from potstill.chart_axis import short
from potstill.charts import key
from potstill.page_frame import Cell, Column, Row, table

ENOUGH = 0.95  # share of the teacher's score
CHANCE = 0.05  # p-values below it are called a difference
LEAST_P = 0.001
TOO_FEW = "too few seeds"


def summary(study: Study) -> str:
    """Sentences for the reader in a hurry, then the notes that qualify them."""
    told = "".join(f"<li>{sentence}</li>" for sentence in _sentences(study))
    notes = "".join(f"<li>{escape(note)}</li>" for note in study.report.get("notes") or [])
    asides = f'<h3>Read this with the figures</h3><ul class="notes">{notes}</ul>' if notes else ""
    return f'<ul class="summary">{told}</ul>{asides}'


def _sentences(study: Study) -> Iterator[str]:
    overall = study.overall
    if overall is None:
        some = any(score["mean"] is not None for score in study.part("scores"))
        yield (
            "No task is finished by all models yet: nothing to compare them by."
            if some
            else "No model has finished a task yet: there is nothing to compare."
        )
        return
    scored = {m: v for m in study.models if (v := overall.values.get(m)) is not None}
    students = {m: v for m, v in scored.items() if m != study.teacher}
    if not students:
        yield "There is no student here to compare with the teacher."
        return
    best = max(students, key=lambda model: students[model])
    yield from _best(study, best, students[best], scored.get(study.teacher or ""), overall.name)
    yield from _enough(study, students, scored.get(study.teacher or ""))
    yield from _difference(study, best)


def _best(
    study: Study, best: str, value: float, of_teacher: float | None, what: str
) -> Iterator[str]:
    share = ""
    if of_teacher:
        name = escape(str(study.teacher))
        whose = "" if "teacher" in name.lower() else f", {name},"
        share = (
            f": <b>{percent(value / of_teacher)}%</b> of what the teacher{whose} has "
            f"({percent(of_teacher)})"
        )
    kind = "student" if study.teacher else "model"
    yield (
        f"The best {kind} is <b>{escape(best)}</b> with {escape(what)} "
        f"<b>{percent(value)}</b>{share}."
    )
    facts = _against_teacher(study, best)
    if facts:
        yield f"It is {' and '.join(facts)}."


def _against_teacher(study: Study, model: str) -> list[str]:
    if study.teacher is None:
        return []
    own, other = study.facts(model), study.facts(study.teacher)
    facts = []
    if own.get("parameters") and other.get("parameters"):
        sizes = f"{short(own['parameters'])} parameters instead of {short(other['parameters'])}"
        ratio = _compared(other["parameters"], own["parameters"], ("smaller", "larger"))
        facts.append(f"{ratio} ({sizes})")
    for kind in study.latencies[:1]:
        fast, slow = study.latency(model, kind), study.latency(study.teacher, kind)
        if fast and slow:
            detail = f"{fast:.3g} ms instead of {slow:.3g} ms, {escape(kind)}"
            facts.append(f"{_compared(slow, fast, ('faster', 'slower'))} ({detail})")
    return facts


def _compared(teacher: float, student: float, words: tuple[str, str]) -> str:
    if 0.95 < teacher / student < 1.05:
        return "<b>no</b> " + words[0]
    if teacher > student:
        return f"<b>{times(teacher, student)}</b> {words[0]}"
    return f"<b>{times(student, teacher)}</b> {words[1]}"


def _enough(study: Study, students: dict[str, float], of_teacher: float | None) -> Iterator[str]:
    if not of_teacher or len(students) < 2:
        return
    kept = [model for model, value in students.items() if value >= ENOUGH * of_teacher]
    sizes = {model: study.facts(model).get("parameters") for model in kept}
    known = {model: size for model, size in sizes.items() if size}
    if not kept:
        yield f"No student keeps {ENOUGH:.0%} of the teacher's score."
    elif known:
        least = min(known, key=lambda model: (known[model], -students[model]))
        yield (
            f"The smallest student that keeps {ENOUGH:.0%} of the teacher's score is "
            f"<b>{escape(least)}</b> ({short(known[least])} parameters, "
            f"{percent(students[least] / of_teacher)}%)."
        )


def _difference(study: Study, best: str) -> Iterator[str]:
    """Whether the best student differs from the teacher by more than chance, task by task."""
    both = [t for t in study.part("tests") if {t["a"], t["b"]} == {best, study.teacher}]
    pairs = [test for test in both if test["metric"] == study.main_metrics.get(test["task"])]
    tested = [test for test in pairs if test["p"] is not None]
    if not tested:
        if study.teacher:
            reasons = dict.fromkeys(str(test.get("reason") or TOO_FEW) for test in pairs)
            why = "; ".join(reasons) or f"no test of {best} and {study.teacher} was made"
            yield f"Whether that is a real difference was not tested: {escape(why)}."
        return
    real = [test for test in tested if test["p"] < CHANCE]
    names = ", ".join(title(test["task"]) for test in real)
    found = f"on {len(real)} ({names})" if real else "on none"
    yield (
        f"Against the teacher it differs beyond chance (paired t-test over seeds, p &lt; {CHANCE}) "
        f"<b>{escape(found)}</b> of {len(tested)} tested task{'s' * (len(tested) != 1)}; elsewhere "
        "no difference is shown, which with few seeds is not the same as none."
    )
    for test in both:  # over all of the tasks at once
        if test["task"] not in study.tasks and test["p"] is not None:
            apart = f"{100 * abs(test['difference']):.1f} points apart"
            p = f"{'= ' if test['p'] >= LEAST_P else ''}{written_p(test['p'])}"
            yield f"{escape(test['task']).capitalize()}: {apart}, p {escape(p)}."


def written_p(p: float) -> str:
    """A p-value as it is written: three digits, or that it is less."""
    return f"{p:.3f}" if p >= LEAST_P else f"< {LEAST_P}"


def models_table(study: Study) -> str:
    """Every model's score, size and speed, the teacher's as the measure; what matters first."""
    cells = {name: [of(model) for model in study.models] for name, of in _figures(study).items()}
    cells = {name: found for name, found in cells.items() if any(c.text != ABSENT for c in found)}
    columns = [Column("model"), *(Column(name, True) for name in cells)]
    rows = [
        Row(
            [
                Cell(model, html=key(study.number(model), study.marked(model))),
                *(found[n] for found in cells.values()),
            ],
            f' data-series="{study.number(model)}"',
        )
        for n, model in enumerate(study.models)
    ]
    board = table(columns, rows, "Score, size and speed of every model", sortable=True)
    return board + (_what_score(study.overall) if study.overall else "")


def _what_score(overall: Overall) -> str:
    said = f"{overall.name}: {overall.definition}" if overall.definition else overall.name
    return f'<p class="note">{escape(said)}</p>'


def _figures(study: Study) -> dict[str, Callable[[str], Cell]]:
    """The columns: their names, and what stands there for a model."""
    overall = study.overall.values if study.overall else {}

    def size(model: str) -> float | None:
        return study.facts(model).get("parameters")

    def fact(field: str, unit: float, form: str) -> Callable[[str], Cell]:
        return lambda model: _figure(study.facts(model).get(field), form, unit)

    def latency(kind: str) -> Callable[[str], Cell]:
        return lambda model: _figure(study.latency(model, kind), "{:,.2f}")

    def speedup(model: str) -> Cell:
        kind = study.latencies[0]
        return _ratio(study.latency(str(study.teacher), kind), study.latency(model, kind))

    name = study.overall.name if study.overall else "score"
    score = {
        f"{name}, %": lambda model: _share(overall.get(model)),
        "% of teacher's": lambda model: _share(_part(overall.get(model), overall, study.teacher)),
    }
    ratios = {"times smaller": lambda model: _ratio(size(str(study.teacher)), size(model))}
    if study.latencies:
        ratios["times faster"] = speedup
    plain = {
        "parameters": fact("parameters", 1, "{:,.0f}"),
        **{f"ms ({_unbroken(kind)})": latency(kind) for kind in study.latencies},
        "MB": fact("size_bytes", 1e6, "{:,.1f}"),
        "GFLOPs a row": fact("flops_per_row", 1e9, "{:,.2f}"),
        "pretraining FLOPs": lambda model: flops_cell(study.pretraining_flops(model)),
    }
    if study.teacher is None:
        del score["% of teacher's"]
        ratios = {}
    return {**score, **ratios, **plain}


def _unbroken(text: str) -> str:
    """The text, which breaks into lines only behind its commas."""
    return text.replace(" ", "\u00a0").replace(",\u00a0", ", ")


def _part(
    value: float | None, values: Mapping[str, float | None], teacher: str | None
) -> float | None:
    whole = values.get(teacher or "")
    return value / whole if value is not None and whole else None


def _share(value: float | None) -> Cell:
    return Cell(percent(value), value)


def _ratio(larger: float | None, smaller: float | None) -> Cell:
    return Cell(times(larger, smaller), larger / smaller if larger and smaller else None)


def flops_cell(flops: float | None) -> Cell:
    """A cell of FLOPs, a dash where they are not known."""
    return Cell(ABSENT) if flops is None else Cell(short(flops), float(flops))


def _figure(value: float | None, form: str, unit: float = 1.0) -> Cell:
    return Cell(ABSENT) if value is None else Cell(form.format(value / unit), float(value))
