"""A report as Markdown and as CSV in long form; both hold nothing that report.json does not."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from finetune.reporting.latency import NO_ONNX
from potstill.chart_axis import short

Report = Mapping[str, Any]
ABSENT = "–"
COLUMNS = ("task", "metric", "model", "lr", "batch_size", "epochs", "train_rows", "seed", "score")


def markdown(report: Report) -> str:
    """All tables of a report; scores in per cent."""
    parts = [
        f"# {cell(report['title'])}",
        _made(report),
        "\n".join(f"- {cell(note)}" for note in report["notes"]),
        "## Best of grid\n\n" + scores_table(report),
        "## All metrics\n\n" + metrics_table(report),
        "## Averages\n\n" + averages_table(report),
        "## Size and speed\n\n" + costs_table(report),
        "## Paired t-tests\n\n" + tests_table(report),
        *distillation_tables(report),
        *paper_tables(report),
        *failed_table(report),
    ]
    return "\n\n".join(parts) + "\n"


def _made(report: Report) -> str:
    """When and where the report was made: date, machine, versions and commit."""
    here = report["environment"]
    versions = here.get("packages", {})
    parts = [report["date"], here.get("cpu") or here.get("platform"), here.get("gpu")]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    parts += [f"commit {here['commit']}"] if here.get("commit") else []
    return f"Made {', '.join(cell(part) for part in parts if part)}."


def cell(value: object) -> str:
    """Any text in one line of Markdown, unable to end its cell or to begin a tag."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def percent(mean: float | None, std: float | None = None) -> str:
    """A score in per cent, with its deviation where there is one."""
    if mean is None:
        return ABSENT
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first `texts` columns are text, the others numbers."""
    rule = ["---"] * texts + ["---:"] * (len(heads) - texts)
    lines = [[cell(head) for head in heads], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _means(report: Report) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(s["model"], s["task"], s["metric"]): s for s in report["scores"]}


def _shown(score: Mapping[str, Any] | None) -> str:
    return ABSENT if score is None else percent(score["mean"], score["std"])


def scores_table(report: Report) -> str:
    """Models against tasks, by the main metric; below them the constant answer and the rows."""
    found, tasks = _means(report), report["tasks"]
    heads = ["model", *(f"{task['name']} {task['metric']}" for task in tasks)]
    rows = [
        [cell(m["name"]), *(_shown(found.get((m["name"], t["name"], t["metric"]))) for t in tasks)]
        for m in report["models"]
    ]
    rows.append(["always the commonest answer", *(percent(task["majority"]) for task in tasks)])
    rows.append(["training rows", *(_rows(task) for task in tasks)])
    rows.append(["validation rows", *(f"{task['rows']['validation']:,}" for task in tasks)])
    return table(heads, rows)


def _rows(task: Mapping[str, Any]) -> str:
    used, full = task["rows"]["train"], task["full_train_rows"]
    return f"{used:,}" if full is None or used >= full else f"{used:,} of {full:,}"


def metrics_table(report: Report) -> str:
    """Every metric of every model and task, with the configuration that was best."""
    heads = ["task", "metric", "model", "score", "majority", "lr", "batch", "epochs", "seeds"]
    majorities = {task["name"]: task["majorities"] for task in report["tasks"]}
    kinds = dict.fromkeys((score["task"], score["metric"]) for score in report["scores"])
    places = {kind: place for place, kind in enumerate(kinds)}
    rows = [
        [
            cell(score["task"]),
            cell(score["metric"]),
            cell(score["model"]),
            percent(score["mean"], score["std"]),
            percent(majorities[score["task"]].get(score["metric"])),
            short(score["lr"]),
            str(score["batch_size"]),
            str(score["epochs"]),
            str(len(score["values"])),
        ]
        for score in sorted(report["scores"], key=lambda s: places[s["task"], s["metric"]])
    ]
    return table(heads, rows, texts=3)


def averages_table(report: Report) -> str:
    """Each model's averages, then what they are; none over fewer tasks than the paper's."""
    averages = report["averages"]
    rows = [
        [cell(model["name"]), *(percent(average["values"][model["name"]]) for average in averages)]
        for model in report["models"]
    ]
    said = "\n".join(f"- {cell(a['name'])}: {cell(a['definition'])}" for a in averages)
    board = table(["model", *(average["name"] for average in averages)], rows)
    return f"{board}\n\n{ABSENT}: the model lacks one of the tasks.\n\n{said}"


def costs_table(report: Report) -> str:
    """Parameters, bytes, FLOPs and milliseconds of each model."""
    models = report["models"]
    cases = list(dict.fromkeys(case for model in models for case in model["latency_ms"]))
    counts = ("parameters", "parameters_without_embeddings")
    heads = [
        *("model", "parameters, M", "without embeddings, M", "size, MB", "GFLOPs a row"),
        *(f"{case}, ms" for case in cases),
    ]
    rows = [
        [
            cell(model["name"]),
            *(_scaled(model[name], 1e6) for name in counts),
            _scaled(model["size_bytes"], 1e6),
            _scaled(model["flops_per_row"], 1e9, digits=3),
            *(_milliseconds(model, case) for case in cases),
        ]
        for model in models
    ]
    return table(heads, rows)


def _milliseconds(model: Mapping[str, Any], case: str) -> str:
    value = model["latency_ms"].get(case)
    if value is None:
        return NO_ONNX if "onnx" in case and case in model["latency_ms"] else ABSENT
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _scaled(value: float | None, unit: float, digits: int = 1) -> str:
    return ABSENT if value is None else f"{value / unit:,.{digits}f}"


def tests_table(report: Report) -> str:
    """Every test; difference in points (a - b), in bold where p < 0.05."""
    if not report["tests"]:
        return "One model only: nothing to test."
    heads = ["task", "metric", "a", "b", "a - b", "t", "p", "seeds"]
    rows = [
        [
            *(cell(test[name]) for name in heads[:4]),
            ABSENT if test["difference"] is None else f"{100 * test['difference']:+.1f}",
            ABSENT if test["t"] is None else f"{test['t']:.2f}",
            _p(test),
            str(test["seeds"]),
        ]
        for test in report["tests"]
    ]
    return table(heads, rows, texts=4)


def _p(test: Mapping[str, Any]) -> str:
    if test["p"] is None:
        return cell(test["reason"])
    shown = "< 0.001" if test["p"] < 0.001 else f"{test['p']:.3f}"
    return f"**{shown}**" if test["p"] < 0.05 else shown


def distillation_tables(report: Report) -> list[str]:
    """Objectives against layer choices, task by task; nothing where no model was so distilled."""
    entries = report["distillations"]
    if not entries:
        return []
    parts = ["## Task-specific distillation"]
    for task in dict.fromkeys(entry["task"] for entry in entries):
        parts.append(_distillation_table(report, task))
    return parts


def _distillation_table(report: Report, task: str) -> str:
    """By the metric that HTD's Tables 1 and 3 have for the task, else by the main one."""
    ours = [entry for entry in report["distillations"] if entry["task"] == task]
    theirs = [r for r in report["papers"] if r["paper"] == "HTD" and r["table"] in ("1", "3")]
    metrics = {row["scores"][task]["metric"] for row in theirs if task in row["scores"]}
    metric = next(iter(metrics), ours[0]["metric"])
    found, shown = _means(report), list(dict.fromkeys([ours[0]["metric"], metric]))
    rows = [
        [
            cell(entry["objective"]),
            cell(entry["init"]),
            *(_shown(found.get((entry["model"], task, name))) for name in shown),
            str(entry["seeds"]),
            _beside(theirs, entry["objective"], entry["init"], task),
        ]
        for entry in ours
    ]
    heads = ["objective", "layers", *(f"ours, {name}" for name in shown), "seeds"]
    return f"### {cell(task)}\n\n" + table([*heads, f"HTD Tables 1 and 3, {metric}"], rows, texts=2)


def _beside(rows: Sequence[Mapping[str, Any]], objective: str, init: str, task: str) -> str:
    """HTD's score of the same objective and layers; its layers are of 12, ours may be of 6."""
    of_six = {"2,4,6": "4,8,12", "1,4,6": "1,8,12"}
    for row in rows:
        if row["objective"] == objective and row["init"] in (init, of_six.get(init)):
            score = row["scores"].get(task)
            return f"{_shown(score)} ({row['init']})" if score else ABSENT
    return ABSENT


def paper_tables(report: Report) -> list[str]:
    """Each table of the papers that has a task of ours, our models above its rows."""
    parts = []
    for (paper, number), group in groupby(report["papers"], lambda r: (r["paper"], r["table"])):
        rows = list(group)
        metrics = {task: s["metric"] for row in rows for task, s in row["scores"].items()}
        shared = [task["name"] for task in report["tasks"] if task["name"] in metrics]
        if shared:
            heading = f"### {paper}, Table {number}"
            parts.append(f"{heading}\n\n{_paper_table(report, rows, shared, metrics)}")
    return ["## Beside the papers", *parts] if parts else []


def _paper_table(
    report: Report,
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    metrics: Mapping[str, str],
) -> str:
    found = _means(report)
    averages = {average["name"]: average["values"] for average in report["averages"]}
    own = averages[rows[0]["average_name"]]
    lines = [
        [
            f"**{cell(model['name'])}** (here)",
            *(_shown(found.get((model["name"], task, metrics[task]))) for task in tasks),
            percent(own[model["name"]]),
        ]
        for model in report["models"]
    ]
    lines += [
        [
            cell(row["model"]),
            *(_shown(row["scores"].get(task)) for task in tasks),
            percent(row["average"]),
        ]
        for row in rows
    ]
    heads = ["model", *(f"{task} {metrics[task]}" for task in tasks), "average of all its tasks"]
    said = [rows[0]["citation"], rows[0]["setting"], f"What differs: {rows[0]['differences']}"]
    said += [f"{row['model']}: {row['note']}" for row in rows if row["note"]]
    return table(heads, lines) + "\n\n" + "\n".join(f"- {cell(text)}" for text in said)


def failed_table(report: Report) -> list[str]:
    """The trials that were given up."""
    names = ("task", "model", "configuration", "reason")
    rows = [[cell(trial[name]) for name in names] for trial in report["failed"]]
    return ["## Failed trials\n\n" + table(names, rows, texts=4)] if rows else []


def csv_text(report: Report) -> str:
    """The best configurations' scores, a row for each seed, as fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    train = {task["name"]: task["rows"]["train"] for task in report["tasks"]}
    for score in report["scores"]:
        for seed, value in score["values"].items():
            facts = {**score, "train_rows": train[score["task"]], "seed": seed, "score": value}
            writer.writerow([facts[name] for name in COLUMNS])
    return text.getvalue()
