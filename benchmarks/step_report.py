"""The table and the chart of `step`'s figures.

python benchmarks/step_report.py benchmarks/results/step-cpu.json docs/images/step-cpu.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from potstill.console import program

COLOURS = ("#b8bfc7", "#7b8794", "#8fc1e3", "#1b6ca8", "#0b3954")  # the rival's two, ours


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: how many times as long as ours each step takes, with quartiles."""
    ours = list(
        dict.fromkeys(n for r in report["rows"] for n in r["steps"] if n.startswith("ours"))
    )
    lines = [
        "| objective, teacher-student | step | ms | tokens/s | of the peak | "
        + " | ".join(f"over {name}" for name in ours)
        + " |",
        "|---|---|---:|---:|---:|" + "---:|" * len(ours),
    ]
    for row in report["rows"]:
        for name, step in row["steps"].items():
            ratios = (ratio(step["times"].get(other)) for other in ours)
            lines.append(
                f"| {row['case']} | {name} | {step['ms']['median']:,.0f} "
                f"| {step['tokens_per_second']:,.0f} | {step['share_of_peak']:.0%} "
                f"| {' | '.join(ratios)} |"
            )
    return "\n".join(lines) + "\n"


def ratio(value: dict[str, float] | None) -> str:
    """A median with its quartiles."""
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})" if value else ""


def draw(report: dict[str, Any], path: Path) -> None:
    """The speed of each step over that of the rival in float32, as SVG."""
    rows = report["rows"]
    figure = Figure(figsize=(8, 0.9 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    kinds = [name.replace(rows[0]["rival"], "rival,") for name in rows[0]["steps"]]
    height = 0.8 / len(kinds)
    for number, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        places = [place + (number - len(kinds) / 2 + 0.5) * height for place in range(len(rows))]
        axes.barh(places, [speeds(row)[number] for row in rows], height, color=colour, label=kind)
    axes.set_yticks(range(len(rows)), [f"{row['case']}\nagainst {row['rival']}" for row in rows])
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed; the rival in float32 = 1")
    figure.legend(loc="outside upper center", ncols=len(kinds), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def speeds(row: dict[str, Any]) -> list[float]:
    """Speed of each step of a case over the first one's, which is the rival's in float32."""
    times = [step["ms"]["median"] for step in row["steps"].values()]
    return [times[0] / time for time in times]


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("report", type=Path, help="What `step --json` wrote.")
    parser.add_argument("chart", type=Path, help="The SVG to write.")
    options = parser.parse_args()
    report = json.loads(options.report.read_text())
    print(table(report))
    draw(report, options.chart)


if __name__ == "__main__":
    main()
