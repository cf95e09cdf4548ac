"""Names beside marks: each goes where it touches no mark, no other name and no edge."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHARACTER, LINE = 7.2, 13.0  # width and height of a label's letters, generous for a sans serif
LONGEST = 26


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: "Box") -> bool:
        """Whether the two share a place."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: "Box") -> bool:
        """Whether all of it lies in the other."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


def shortened(name: str, longest: int = LONGEST) -> str:
    """The name, its middle left out where it is too long."""
    if len(name) <= longest:
        return name
    head = longest // 2
    return f"{name[:head]}…{name[head + 1 - longest :]}"


def width_of(text: str) -> float:
    """About the width of a text; wide letters count twice."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return CHARACTER * (len(text) + wide)


def placed(
    names: Sequence[str], marks: Sequence[tuple[float, float]], others: Sequence[Box], edge: Box
) -> list[Box | None]:
    """A box for the name of each mark, None where there is no room.

    Args:
        marks: the places of the marks. others: what else no name may touch. edge: of the chart.
    """
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in marks] + list(others)
    found: list[Box | None] = []
    for name, (x, y) in zip(names, marks, strict=True):
        candidates = (box for box in _around(x, y, width_of(name)) if box.inside(edge))
        box = next((b for b in candidates if not any(b.touches(t) for t in taken)), None)
        found.append(box)
        taken += [box] if box else []
    return found


def _around(x: float, y: float, width: float) -> Iterator[Box]:
    """Right, left, above, below, then the corners: the order in which a reader looks."""
    lefts = {1: x + 9, -1: x - 9 - width, 0: x - width / 2}
    for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
        left, top = lefts[across], y - LINE / 2 + down * (LINE / 2 + 9)
        yield Box(left, top, left + width, top + LINE)
