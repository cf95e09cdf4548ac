"""The results of a search: its finished points, read from their records, and the tables of them."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.results import writing
from finetune.search.folder import FAILED, RECORDS, read_own
from finetune.search.points import NONE, WHOLE
from finetune.search.runs import STORE, TRAINING, VALIDATE
from potstill.files import write_json, write_text

LOSS = "held-out loss"
COLUMNS = ("name", "keep", "depth", "length", "width", "bytes_per_token", "seed", "measure")


@dataclass(frozen=True)
class Measured:
    """A finished point of the curve.

    Attributes:
        values: by measure ("held-out loss", "sst2 accuracy") the figure of each seed; scores in
            per cent, None where one is undefined.
        constant: by measure the score of always giving the same answer.
        seconds: of storing, and of training all seeds.
    """

    name: str
    keep: str
    choices: dict[str, str]
    bytes: int
    bytes_per_token: float
    seconds: dict[str, float]
    values: dict[str, dict[int, float | None]]
    constant: dict[str, float | None] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        """How many students were trained; scores of some of them may be missing yet."""
        return len(self.values[LOSS])

    def mean(self, measure: str) -> float | None:
        """The mean over all seeds; None where a figure is missing, undefined or infinite."""
        values = self.values.get(measure, {}).values()
        known = [value for value in values if value is not None and math.isfinite(value)]
        return statistics.fmean(known) if known and len(known) == self.seeds else None

    def spread(self, measure: str) -> float | None:
        """The standard deviation over seeds, of a sample; None for one seed."""
        values = list(self.values[measure].values())
        if self.mean(measure) is None or len(values) < 2:
            return None
        return statistics.stdev(value for value in values if value is not None)


def write_tables(output: Path, points: Sequence[Measured]) -> None:
    """Write results.csv, summary.md and results.json into the folder of a search.

    Raises:
        InputError: the record of a failure cannot be read.
        TrainingError: a table cannot be written.
    """
    failed = read_failed(output)
    report = {"points": [_entry(point) for point in points], "failed": failed}
    with writing(output):
        write_text(output / "results.csv", _csv(points))
        write_text(output / "summary.md", summary(points, failed))
        write_json(output / "results.json", report)


def measures_of(points: Sequence[Measured]) -> list[str]:
    """The names of all that was measured, the held-out loss first."""
    return list(dict.fromkeys(name for point in points for name in point.values))


def read_points(output: Path) -> list[Measured]:
    """The points whose students are trained and validated, by bytes per token.

    Raises:
        InputError: a record cannot be read.
    """
    folders = [path.parent for path in sorted((output / RECORDS).glob(f"*/{VALIDATE}.json"))]
    points = [_read(folder) for folder in folders]
    return sorted(points, key=lambda point: (point.bytes_per_token, point.name))


def _read(folder: Path) -> Measured:
    stages = {path.stem: read_own(path) for path in sorted(folder.glob("*.json"))}
    store, losses = stages[STORE], stages[VALIDATE]["losses"]
    values: dict[str, dict[int, float | None]] = {LOSS: {int(s): v for s, v in losses.items()}}
    constant: dict[str, float | None] = {}
    for name, stage in stages.items():
        if "task" in stage:
            measure = f"{stage['task']} {stage['metric']}, %"
            values.setdefault(measure, {})[int(name.rpartition("-")[2])] = _percent(stage["score"])
            constant[measure] = _percent(stage["majority"])
    return Measured(
        folder.name,
        store["keep"],
        store["choices"],
        store["bytes"],
        store["bytes_per_token"],
        {stage: stages[stage]["seconds"] for stage in (STORE, TRAINING)},
        values,
        constant,
    )


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def read_failed(output: Path) -> list[dict[str, str]]:
    """The points that did not come to their end, and why.

    Raises:
        InputError: a record cannot be read.
    """
    paths = sorted((output / RECORDS).glob(f"*/{FAILED}.json"))
    return [{"name": path.parent.name, "reason": read_own(path)["reason"]} for path in paths]


def share_kept(point: Measured, points: Sequence[Measured], measure: str) -> float | None:
    """How much of what the whole knowledge gains over none this point gains; 1 is all of it."""
    ends = [one.mean(measure) for keep in (NONE, WHOLE) for one in points if one.keep == keep]
    mean = point.mean(measure)
    if mean is None or len(ends) < 2 or None in ends or ends[0] == ends[1]:
        return None
    none, whole = (float(end) for end in ends if end is not None)
    return (mean - none) / (whole - none) + 0.0  # of -0 it makes 0


def _entry(point: Measured) -> dict[str, Any]:
    return {
        "name": point.name,
        "keep": point.keep,
        "choices": point.choices,
        "bytes": point.bytes,
        "bytes_per_token": point.bytes_per_token,
        "seconds": point.seconds,
        "measures": {
            name: {
                "values": {str(seed): value for seed, value in point.values[name].items()},
                "mean": point.mean(name),
                "std": point.spread(name),
                "constant": point.constant.get(name),
            }
            for name in point.values
        },
    }


def _csv(points: Sequence[Measured]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, "value"), lineterminator="\n")
    writer.writeheader()
    for point in points:
        shared = {"name": point.name, "keep": point.keep, **point.choices}
        for measure, values in point.values.items():
            for seed, value in values.items():
                own = {"bytes_per_token": point.bytes_per_token, "seed": seed, "measure": measure}
                writer.writerow({**shared, **own, "value": value})
    return text.getvalue()


def summary(points: Sequence[Measured], failed: Sequence[Mapping[str, str]]) -> str:
    """The points as Markdown, then what failed."""
    measures = measures_of(points)
    lines = [
        "Mean ± sample standard deviation over seeds. Gain: of the held-out loss, as a share of "
        "what the whole knowledge gains over none.",
        "",
        f"| cut | choices | bytes/token | {' | '.join(measures)} | gain | storing, s "
        "| training, s |",
        "|---|---|---:|" + "---:|" * (len(measures) + 3),
    ]
    for point in points:
        figures = " | ".join(_figure(point, name) for name in measures)
        share = share_kept(point, points, LOSS)
        lines.append(
            f"| {point.keep} | {', '.join(point.choices.values())} "
            f"| {_short(point.bytes_per_token)} | {figures} "
            f"| {'' if share is None else f'{share:.0%}'} "
            f"| {point.seconds[STORE]:.0f} | {point.seconds[TRAINING]:.0f} |"
        )
    if failed:
        lines += ["", "| failed | reason |", "|---|---|"]
        lines += [f"| {one['name']} | {one['reason'].replace('|', '/')} |" for one in failed]
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure(point: Measured, measure: str) -> str:
    mean = point.mean(measure)
    if mean is None:
        scored = len(point.values.get(measure, {}))
        if 0 < scored < point.seeds:
            return f"{scored} of {point.seeds} seeds"
        return "undefined" if scored else ""
    spread = point.spread(measure)
    return f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
