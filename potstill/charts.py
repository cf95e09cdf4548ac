"""Charts as inline SVG: no script, no file beside it, colours that follow the page.

A series has a number, which gives it a colour and a mark of its own: colour alone says nothing.
Every mark carries what it says as text, for the pointer and for screen readers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from potstill.chart_axis import Axis, padded, short
from potstill.chart_labels import Box, placed, shortened

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 26, 14, 46  # room for the axes' labels
COLOURS = 8
_MARKS = (
    "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z",  # circle
    "M-4 -4H4V4H-4Z",  # square
    "M0 -5.2L5 3.6H-5Z",  # triangle
    "M0 -5.6L5.6 0L0 5.6L-5.6 0Z",  # diamond
    "M0 5.2L5 -3.6H-5Z",  # triangle on its tip
    "M-1.8 -5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",  # cross
)
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 5")  # 40 series and none like another


def colour(number: int) -> str:
    """The class that gives a series its colour."""
    return f"c{number % COLOURS}"


def shape(number: int) -> str:
    """The path of a series' mark around 0, 0; the first 40 pairs of colour and mark differ."""
    return _MARKS[(number % COLOURS + number // COLOURS) % len(_MARKS)]


@dataclass(frozen=True)
class Line:
    """A curve: its points in order; `tips` say in words what each point is, and mark it."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False
    tips: Sequence[str] = ()
    number: int | None = None  # of the series; None: its place in the chart
    thin: bool = False  # in the background, and not in the legend


@dataclass(frozen=True)
class Dot:
    """A point with a name; `low` and `high` are the ends of its whisker."""

    name: str
    x: float
    y: float
    tip: str
    number: int
    low: float | None = None
    high: float | None = None


def line_chart(
    lines: Sequence[Line], x: str, y: str, logarithmic: bool = False, legend: bool = True
) -> str:
    """An SVG element. `x`, `y` name the axes; points that are not finite are left out."""
    curves = [_finite(n, line) for n, line in enumerate(lines)]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return f'<p class="note">No figures for {escape(y)}.</p>'
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    logarithmic = logarithmic and min(ys) > 0
    low, high = padded(ys) if min(ys) == max(ys) and not logarithmic else (min(ys), max(ys))
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=all(v == int(v) for v in xs))
    up = Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    named = [curve for curve in curves if not curve.thin]
    title = f"{y} over {x}: {', '.join(curve.name for curve in named)}"
    drawn = "".join(_curve(curve, across, up) for curve in curves)
    return _svg(title, HEIGHT, _axes(across, up, x, y) + drawn) + (_legend(named) if legend else "")


def scatter(
    dots: Sequence[Dot], x: str, y: str, logarithmic: bool = False, level: float | None = None
) -> str:
    """An SVG element: points with their names beside them, as far as there is room.

    Whoever has no room for its name is told by its mark, colour and tip. `level`, a value of `y`,
    gets a dashed line across.
    """
    dots = [dot for dot in dots if _all_finite(dot.x, dot.y) and (dot.x > 0 or not logarithmic)]
    if not dots:
        return f'<p class="note">No figures for {escape(y)} over {escape(x)}.</p>'
    ys = [v for dot in dots for v in (dot.y, dot.low, dot.high, level) if v is not None]
    across = Axis(*padded([dot.x for dot in dots], logarithmic), LEFT, WIDTH - RIGHT, logarithmic)
    up = Axis(*padded(ys), HEIGHT - BOTTOM, TOP)
    title = f"{y} over {x}: {', '.join(dot.name for dot in dots)}"
    at = None if level is None else up.place(level)
    line = "" if at is None else f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
    drawn = line + "".join(_dots(dots, across, up, at))
    return _svg(title, HEIGHT, _axes(across, up, x, y) + drawn)


def dot_rows(rows: Sequence[tuple[str, Sequence[Dot]]], x: str) -> str:
    """An SVG element: under the name of each row its dots one below the other, `Dot.x` across.

    `Dot.y` is not looked at; `Dot.name` is written at the right, such as the value. `Dot.number`
    gives colour and mark only: the dots are no series of the page, which a reader hides by number.
    """
    rows = [(name, [dot for dot in dots if math.isfinite(dot.x)]) for name, dots in rows]
    values = [v for _, ds in rows for d in ds for v in (d.x, d.low, d.high) if v is not None]
    if not values:
        return f'<p class="note">No figures for {escape(x)}.</p>'
    right = 104
    height = sum(24 + 17 * len(dots) for _, dots in rows) + TOP + BOTTOM
    across = Axis(*padded(values), 16, WIDTH - right)
    parts, top = [_ticks_across(across, height, TOP), _name_across(x, 16, right, height)], TOP
    for name, dots in rows:
        parts.append(
            f'<text class="label" x="4" y="{top + 14}">{escape(shortened(name, 60))}</text>'
        )
        top += 18
        for dot in dots:
            top += 17
            parts.append(_dot_of_row(dot, across, top - 7, WIDTH - right + 12))
        top += 6
    return _svg(f"{x}: {', '.join(name for name, _ in rows)}", height, "".join(parts))


def _dot_of_row(dot: Dot, across: Axis, y: float, end: float) -> str:
    whisker = ""
    if dot.low is not None and dot.high is not None:
        left, right = across.place(dot.low), across.place(dot.high)
        whisker = f'<path class="whisker" d="M{left:.1f} {y}H{right:.1f}"/>'
    text = f'<text class="label" x="{end}" y="{y + 4}">{escape(dot.name)}</text>'
    mark = _mark(dot.number, across.place(dot.x), y, dot.tip)
    return f'<g class="{colour(dot.number)}">{whisker}{mark}{text}</g>'


def _all_finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _finite(place: int, line: Line) -> Line:
    kept = [n for n, point in enumerate(line.points) if _all_finite(*point)]
    tips = [line.tips[n] for n in kept] if line.tips else ()
    number = place if line.number is None else line.number
    return replace(line, points=[line.points[n] for n in kept], tips=tips, number=number)


def _svg(title: str, height: float, content: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="group" tabindex="0" '
        f'aria-label="{escape(title)}">{content}</svg>'
    )


def _axes(across: Axis, up: Axis, x: str, y: str) -> str:
    parts = [_ticks_across(across, HEIGHT), _name_across(x, LEFT, RIGHT, HEIGHT)]
    for tick in up.ticks():
        place = up.place(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>"
    )
    return "".join(parts)


def _ticks_across(across: Axis, height: float, line_from: float | None = None) -> str:
    parts = []
    for tick in across.ticks():
        place = across.place(tick)
        if line_from is not None:
            parts.append(f'<path class="grid" d="M{place:.1f} {line_from}V{height - BOTTOM}"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{height - BOTTOM + 18:g}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    return "".join(parts)


def _name_across(name: str, left: float, right: float, height: float) -> str:
    middle = (left + WIDTH - right) / 2
    return f'<text x="{middle:g}" y="{height - 8:g}" text-anchor="middle">{escape(name)}</text>'


def _curve(curve: Line, across: Axis, up: Axis) -> str:
    number = curve.number or 0
    places = [(across.place(x), up.place(y)) for x, y in curve.points]
    path = "".join(f"{'L' if n else 'M'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(places))
    dashes = _DASHES[number // COLOURS % len(_DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    thin = " thin" if curve.thin else ""
    tips = curve.tips or [f"{curve.name}: {x:g}, {y:g}" for x, y in curve.points]
    marks = [_mark(number, *place, tip) for place, tip in zip(places, tips, strict=True)]
    shown = "".join(marks) if curve.marked or len(places) == 1 else ""
    return (
        f'<g class="{colour(number)}" data-series="{number}">'
        f'<path class="curve{thin}"{dashed} d="{path}"/>{shown}</g>'
    )


def _mark(number: int, x: float, y: float, tip: str) -> str:
    return (
        f'<g class="mark" role="img" tabindex="-1" transform="translate({x:.1f} {y:.1f})">'
        f'<title>{escape(tip)}</title><circle class="reach" r="10"/><path d="{shape(number)}"/></g>'
    )


def _dots(dots: Sequence[Dot], across: Axis, up: Axis, level: float | None) -> Iterable[str]:
    places = [(across.place(dot.x), up.place(dot.y)) for dot in dots]
    ends = [
        None if dot.low is None or dot.high is None else (up.place(dot.high), up.place(dot.low))
        for dot in dots
    ]
    names = [shortened(dot.name) for dot in dots]
    lines = [
        Box(x - 2, end[0], x + 2, end[1]) for (x, _), end in zip(places, ends, strict=True) if end
    ]
    lines += [] if level is None else [Box(LEFT, level - 1, WIDTH, level + 1)]
    boxes = placed(names, places, lines, Box(LEFT, TOP - 8, WIDTH, HEIGHT - BOTTOM + 4))
    for dot, name, (x, y), end, box in zip(dots, names, places, ends, boxes, strict=True):
        line = f'<path class="whisker" d="M{x:.1f} {end[0]:.1f}V{end[1]:.1f}"/>' if end else ""
        text = (
            f'<text class="label" x="{(box.left + box.right) / 2:.1f}" y="{box.bottom - 3:.1f}" '
            f'text-anchor="middle">{escape(name)}</text>'
            if box
            else ""
        )
        yield (
            f'<g class="{colour(dot.number)}" data-series="{dot.number}">{line}'
            f"{_mark(dot.number, x, y, dot.tip)}{text}</g>"
        )


def key(number: int, name: str) -> str:
    """A mark with its name, for legends."""
    return (
        f'<span class="key"><svg class="{colour(number)}" viewBox="-6 -6 12 12" '
        f'aria-hidden="true"><path fill="currentColor" d="{shape(number)}"/></svg> '
        f"{escape(name)}</span>"
    )


def _legend(curves: Sequence[Line]) -> str:
    return f'<p class="legend">{"".join(key(c.number or 0, c.name) for c in curves)}</p>'
