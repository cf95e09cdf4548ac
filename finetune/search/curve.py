"""The curve of a search: held-out loss and scores against the bytes that a token was learnt from.

Where marginal utility diminishes, it is steep from nothing on, and flat long before the whole.
"""

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.results import writing
from finetune.search.points import NONE, WHOLE
from finetune.search.results import LOSS, Measured, measures_of
from potstill.files import write_bytes

COLOURS = ("#1b6ca8", "#d1603d", "#3c8d5a", "#8a5aa8", "#b8860b", "#4a5560")
MARKS = "os^Dv*"
GREY = "#8a929a"
_METADATA = {"svg": {"Date": None}, "png": {"Software": None}}  # the same bytes every time


def write_curve(output: Path, points: Sequence[Measured]) -> None:
    """Draw curve.svg and curve.png, a panel for each measure.

    Raises:
        TrainingError: they cannot be written.
    """
    measures = measures_of(points)
    figure = Figure(figsize=(5.2 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        draw(axes, points, measure)
    with writing(output), rc_context({"svg.hashsalt": "potstill"}):
        for kind, metadata in _METADATA.items():
            image = io.BytesIO()
            figure.savefig(image, format=kind, dpi=150, metadata=metadata)
            write_bytes(output / f"curve.{kind}", image.getvalue())


def draw(axes: Axes, points: Sequence[Measured], measure: str) -> None:
    """One panel: every point with its spread, by the choices of its cut, and the best up to it."""
    shown = [point for point in points if point.mean(measure) is not None and point.bytes > 0]
    if shown:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    sizes, best = frontier(shown, measure)
    axes.step(sizes, best, where="post", color=GREY, linewidth=1, label="best so far")
    kinds = list(dict.fromkeys(kind_of(point) for point in shown))
    for number, kind in enumerate(kinds):
        own = [point for point in shown if kind_of(point) == kind]
        _series(axes, own, measure, kind, number)
    _names(axes, shown, measure)
    for point in points:
        mean = point.mean(measure)
        if point.keep == NONE and mean is not None:
            axes.axhline(mean, color=GREY, linestyle=":", label="no knowledge (0 bytes)")
    axes.set(xlabel="bytes per token", ylabel=measure)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=7)


def frontier(points: Sequence[Measured], measure: str) -> tuple[list[float], list[float]]:
    """Bytes per token, ascending, and the best mean of all points up to there."""
    means = sorted((point.bytes_per_token, float(point.mean(measure) or 0)) for point in points)
    better = min if measure == LOSS else max
    return [size for size, _ in means], list(accumulate((mean for _, mean in means), better))


def kind_of(point: Measured) -> str:
    """What the legend calls a point: the choices of its cut."""
    return WHOLE if point.keep == WHOLE else ", ".join(point.choices.values()) or "cut"


def _names(axes: Axes, points: Sequence[Measured], measure: str) -> None:
    """The cut beside each point, of neighbours on different sides."""
    for number, point in enumerate(points):
        right = number % 2 == 1 or point == points[-1]  # behind the last there is room
        axes.annotate(
            point.keep,
            (point.bytes_per_token, float(point.mean(measure) or 0)),
            (5, -3) if right else (-5, -3),
            textcoords="offset points",
            ha="left" if right else "right",
            fontsize=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3},
        )


def _series(axes: Axes, points: Sequence[Measured], measure: str, kind: str, number: int) -> None:
    sizes = [point.bytes_per_token for point in points]
    means = [float(point.mean(measure) or 0) for point in points]
    axes.errorbar(
        sizes,
        means,
        [point.spread(measure) or 0 for point in points],
        fmt=MARKS[number % len(MARKS)],
        color=COLOURS[number % len(COLOURS)],
        capsize=3,
        elinewidth=0.8,
        markersize=5,
        label=kind,
    )
