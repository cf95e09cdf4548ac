"""The demo's page: one HTML file that needs nothing else, readable on a phone, light or dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from examples.demo.charts import Line, line_chart

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6875; --paper: #fbfaf7;
  --line: #d9d6cd; --c0: #0b6e99; --c1: #b8560f; --c2: #3f7d3a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #a3adb8; --paper: #15191e;
  --line: #39414b; --c0: #5cc0ec; --c1: #f0a15e; --c2: #8fd088; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 46rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: color-mix(in srgb, var(--ink) 7%, transparent); padding: .6rem;
  white-space: pre-wrap; font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--soft); }
.grid { stroke: var(--line); } .curve path { fill: none; stroke-width: 2; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.curve path { stroke: currentColor; } .curve circle { fill: currentColor; }
.legend, .note { color: var(--soft); font-size: .9rem; }
"""


def page(results: Mapping[str, Any]) -> str:
    """The page of `results`, the content of results.json."""
    body = "".join(
        (
            "<h1>From text to a fine-tuned student</h1>",
            _summary(results),
            "<h2>Fine-tuned on one small task</h2>",
            _table(results["models"]),
            f'<p class="note">{escape(results["note"])}</p>',
            "<h2>The teacher learns to fill in words</h2>",
            _losses(results["curves"]["teacher"], "masked-word loss"),
            "<h2>The student learns from the teacher</h2>",
            _losses(results["curves"]["student"], "distillation loss", logarithmic=True),
            "<h2>What was run</h2>",
            _stages(results["stages"]),
            "<h2>Machine</h2>",
            _facts(results["environment"]),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Potstill demo</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _summary(results: Mapping[str, Any]) -> str:
    corpus, export = results["corpus"], results["export"]
    sentences = (
        f"{corpus['megabytes']:.1f} MB of prose in {corpus['documents']:,} documents, taken from "
        f"this Python installation, became {corpus['tokens']:,} tokens. A teacher of "
        f"{results['teacher']} was trained on them, and a student of {results['student']} was "
        f"distilled from it with {results['objective']} on {results['ranks']} ranks, starting from "
        f"{results['init']}. Reopened from its folder, the student's logits differ by at most "
        f"{export['max_abs_difference']:.1e} from those it had in training."
    )
    return f"<p>{escape(sentences)}</p>"


def _table(models: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(model['name'])}</td>"
        f'<td class="number">{model["parameters"]:,}</td>'
        f'<td class="number">{100 * model["accuracy"]:.1f}</td>'
        f'<td class="number">{100 * model["macro_f1"]:.1f}</td></tr>'
        for model in models
    )
    return (
        '<div class="scroll"><table><thead><tr><th>model</th><th class="number">parameters</th>'
        '<th class="number">accuracy, %</th><th class="number">macro F1, %</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _losses(curves: Mapping[str, Any], name: str, logarithmic: bool = False) -> str:
    lines = [Line("training", curves["train"]), Line("held out", curves["validation"], marked=True)]
    return line_chart(lines, "step", name, logarithmic)


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        f"<p>{escape(stage['title'])} ({stage['seconds']:.0f} s)</p>"
        f"<pre>{escape(stage['command'])}</pre>"
        for stage in stages
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
