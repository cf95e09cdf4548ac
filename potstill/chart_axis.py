"""Axes of our charts: from numbers to places, and the round numbers written along them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TICKS = 7


@dataclass(frozen=True)
class Axis:
    """The way from numbers to places; logarithmic, or of whole numbers only, if asked for."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    whole: bool = False

    def place(self, value: float) -> float:
        """The place of a value."""
        low, high = self._scale(self.low), self._scale(self.high)
        share = (self._scale(value) - low) / ((high - low) or 1)
        return self.start + share * (self.end - self.start)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self) -> list[float]:
        """Round numbers: 1, 2, 5 times a power of ten; `MOST_TICKS` at most on a long way."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                candidates = [digit * 10.0**power for power in powers for digit in digits]
                inside = [tick for tick in candidates if self.low <= tick <= self.high]
                if len(inside) <= MOST_TICKS:
                    break
            if len(inside) >= 2:
                return inside[:: math.ceil(len(inside) / MOST_TICKS)]
        return self._even_ticks()

    def _even_ticks(self) -> list[float]:
        step = round_step((self.high - self.low) / 5)
        step = max(step, 1) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(step: float) -> float:
    """The next number of 1, 2, 5 times a power of ten; 1 for a step of nothing."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def padded(values: Sequence[float], logarithmic: bool = False) -> tuple[float, float]:
    """The span of `values` with room around it, so that no mark lies on an edge."""
    low, high = min(values), max(values)
    if logarithmic:
        room = (high / low) ** 0.12 if high > low else 2.0
        return low / room, high * room
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A number in few characters: 0.5, 20, 5k, 22.7M, 1.5G, 2e17."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    for least, unit, name in units:
        if size >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:.4g}"
