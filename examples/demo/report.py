"""The demo's page: one HTML file that needs nothing else, readable on a phone, light or dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from potstill.charts import Line, line_chart
from potstill.page_frame import Column, Row, frame, table


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
    return frame("Potstill demo", body)


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
    names = ("parameters", "accuracy, %", "macro F1, %")
    columns = [Column("model"), *(Column(name, number=True) for name in names)]
    rows = [
        Row(
            [
                model["name"],
                f"{model['parameters']:,}",
                f"{100 * model['accuracy']:.1f}",
                f"{100 * model['macro_f1']:.1f}",
            ]
        )
        for model in models
    ]
    return table(columns, rows, "Scores on the small task")


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
    rows = [Row([str(name), str(value)]) for name, value in facts.items()]
    return table([Column("what"), Column("found")], rows, "Machine")
