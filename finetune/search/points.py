"""The points of a search's curve: which cuts are compared, and in which order they are tried."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from finetune.search.settings import ALL, SearchSettings
from potstill.errors import InputError
from pretrain.knowledge.cuts import Cut, mapped_layers, parse_cut

NONE, WHOLE = "none", "whole"
"""The two points that every search has: students without any training, and nothing cut."""

UNITS = {"l": "depth", "t": "length", "h": "width"}


@dataclass(frozen=True)
class Point:
    """A cut such as `1l_10t_0.1h`, or `none` or `whole`.

    Attributes:
        choices: what is kept along each dimension that is cut, by name: ("length", "attention");
            of what is missing `pretrain/cache_knowledge.py` has a default.
    """

    keep: str
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """What its folders are called."""
        return "-".join([self.keep, *(choice for _, choice in self.choices)])

    @property
    def is_cut(self) -> bool:
        """Whether it leaves some knowledge out and keeps some."""
        return self.keep not in (NONE, WHOLE)

    @property
    def flags(self) -> list[str]:
        """What `cache_knowledge.py` is told of it."""
        kept = ["--keep", self.keep] if self.is_cut else []
        return kept + [word for name, value in self.choices for word in (f"--keep_{name}", value)]

    def cut(self) -> Cut:
        """What is kept.

        Raises:
            InputError: it is no cut.
        """
        chosen = dict(self.choices)
        keep = self.keep if self.is_cut else None
        return parse_cut(keep, chosen.get("depth"), chosen.get("length"), chosen.get("width"))

    def layers(self, settings: SearchSettings, teacher_layers: int) -> str | None:
        """The layer pairs of a cut in depth, as `--layers` has them; None for another one.

        Raises:
            InputError: layers that the student or the teacher has not.
        """
        return mapped_layers(self.cut(), settings.student_layers, teacher_layers)

    def size(self, layers: int, tokens: int) -> float:
        """About how much it keeps of so many: layers x tokens x share of the neurons."""
        if not self.is_cut:
            return 0.0 if self.keep == NONE else math.inf
        cut = self.cut()
        width = 1.0 if cut.width is None else cut.width
        return (cut.layers or layers) * cut.slots(tokens) * width


def points_of(settings: SearchSettings, teacher_layers: int, tokens: int) -> list[Point]:
    """The points that the flags ask for, each once, the cheapest first.

    Args:
        teacher_layers, tokens: of the teacher, and of a row.

    Raises:
        InputError: a cut or a choice makes no sense, or there is no cut.
    """
    points = {one.name: one for keep in _keeps(settings) for one in _chosen(keep, settings)}
    for point in points.values():
        point.layers(settings, teacher_layers)
    found = [*points.values(), Point(NONE), Point(WHOLE)]
    return sorted(found, key=lambda one: (one.size(settings.student_layers, tokens), one.name))


def _keeps(settings: SearchSettings) -> list[str]:
    """The cuts of `--keeps`, or of the three lists; without the two points of every search.

    Raises:
        InputError: neither is given, or both are.
    """
    listed = {unit: getattr(settings, f"{name}s") for unit, name in UNITS.items()}
    if (settings.keeps is None) == (set(listed.values()) == {None}):
        raise InputError(
            "which cuts? give either --keeps 1l_10t_0.1h,2l_50t, or lists of which every "
            "combination is taken: --depths 1,2 --lengths 10,50 --widths 0.1,all"
        )
    keeps = _product(listed) if settings.keeps is None else settings.keeps.split(",")
    return [keep for keep in keeps if keep not in (NONE, WHOLE)]


def _product(listed: dict[str, str | None]) -> Iterable[str]:
    """The cuts of every combination; one in which all is kept is the whole."""
    parts = [
        ["" if value == ALL else f"{value}{unit}" for value in (values or ALL).split(",")]
        for unit, values in listed.items()
    ]
    return ("_".join(filter(None, chosen)) or WHOLE for chosen in itertools.product(*parts))


def _chosen(keep: str, settings: SearchSettings) -> Iterable[Point]:
    """A cut with every combination of the choices that matter to it.

    Raises:
        InputError: it is no cut.
    """
    parse_cut(keep)
    names = [UNITS[part[-1]] for part in keep.split("_")]
    given = {name: getattr(settings, f"keep_{name}") for name in names}
    parts = [[(n, one) for one in values.split(",")] for n, values in given.items() if values]
    return (Point(keep, choices) for choices in itertools.product(*parts))
