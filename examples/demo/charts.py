"""Line charts as inline SVG: no script, no file beside it, colours that follow the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48  # room for the axes' labels


@dataclass(frozen=True)
class Line:
    """A curve: its points in order, and whether each is marked."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """The way from numbers to pixels; logarithmic if asked for."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / ((high - low) or 1)
        return self.start + share * (self.end - self.start)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Round numbers: 1, 2, 5 times a power of ten."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            candidates = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [tick for tick in candidates if self.low <= tick <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def line_chart(lines: Sequence[Line], x: str, y: str, logarithmic: bool = False) -> str:
    """An SVG element. `x`, `y` name the axes; non-finite points are left out."""
    curves = [
        Line(line.name, [p for p in line.points if all(map(math.isfinite, p))], line.marked)
        for line in lines
    ]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return f"<p>No figures for {escape(y)}.</p>"
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    logarithmic = logarithmic and min(ys) > 0
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [_grid(across, up), *(_curve(n, curve, across, up) for n, curve in enumerate(curves))]
    title = f"{y} over {x}: {', '.join(curve.name for curve in curves)}"
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}"
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>'
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text></svg>{_legend(curves)}'
    )


def _grid(across: Axis, up: Axis) -> str:
    parts = []
    for tick in up.ticks():
        y = up.place(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in across.ticks():
        parts.append(
            f'<text x="{across.place(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    return "".join(parts)


def _curve(number: int, curve: Line, across: Axis, up: Axis) -> str:
    places = [(across.place(x), up.place(y)) for x, y in curve.points]
    path = "".join(f"{'L' if n else 'M'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(places))
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places)
    return f'<g class="curve c{number % 3}"><path d="{path}"/>{dots if curve.marked else ""}</g>'


def _legend(curves: Sequence[Line]) -> str:
    names = (
        f'<span class="c{number % 3}">&#9679;</span> {escape(curve.name)}'
        for number, curve in enumerate(curves)
    )
    return f'<p class="legend">{" &nbsp; ".join(names)}</p>'
