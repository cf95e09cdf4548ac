"""Charts: where a number is placed and how it is written, marks that differ, names that fit."""

import math
import re

import pytest

from potstill.chart_axis import MOST_TICKS, Axis, padded, short
from potstill.chart_labels import Box, placed, shortened, width_of
from potstill.charts import Dot, Line, colour, dot_rows, line_chart, scatter, shape


def test_an_axis_places_its_ends_and_its_middle() -> None:
    plain, logarithmic = Axis(0, 10, 100, 200), Axis(0.1, 10, 0, 100, logarithmic=True)
    assert [plain.place(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert [round(logarithmic.place(value)) for value in (0.1, 1, 10)] == [0, 50, 100]
    assert plain.ticks() == [0, 2, 4, 6, 8, 10]
    assert logarithmic.ticks() == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])


def test_an_axis_of_epochs_has_no_halves() -> None:
    assert Axis(1, 3, 0, 1, whole=True).ticks() == [1, 2, 3]


@pytest.mark.parametrize(("low", "high"), [(1e7, 2.3e7), (1e15, 1e19), (3, 4), (1e-3, 1e9)])
def test_a_logarithmic_axis_has_some_ticks_but_never_too_many(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 1, logarithmic=True).ticks()
    assert 2 <= len(ticks) <= MOST_TICKS and all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        *((0, "0"), (0.5, "0.5"), (-20, "-20"), (2500, "2500"), (20000, "20k"), (22.7e6, "22.7M")),
        *((1.5e9, "1.5G"), (2e17, "2e17"), (3e-5, "3e-5"), (1.55e19, "1.55e19")),
    ],
)
def test_a_number_is_written_in_few_characters(value: float, written: str) -> None:
    assert short(value) == written


def test_a_lone_value_gets_room_on_both_sides() -> None:
    for value, logarithmic in ((5.0, False), (0.0, False), (1e9, True)):
        low, high = padded([value], logarithmic)
        assert low < value < high


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart([Line("loss", [(0, 2.0), (1, math.nan), (2, 1.0)])], "step", "loss")
    assert "nan" not in chart and len(re.findall(r'class="curve" d="M[^L]+L[^L]+"', chart)) == 1


def test_a_chart_without_figures_says_so() -> None:
    assert "No figures" in line_chart([], "step", "loss")
    assert "No figures" in scatter([Dot("a", math.nan, 1, "", 0)], "x", "y")
    assert "No figures" in dot_rows([("row", [])], "x")


def test_forty_series_all_look_different() -> None:
    assert len({(colour(n), shape(n)) for n in range(40)}) == 40


def test_every_mark_says_in_words_what_it_is() -> None:
    dots = [Dot("a", 1, 2, "a: 2 at 1", 0, 1.5, 2.5), Dot("b", 3, 4, "b: 4 at 3", 1)]
    for chart in (scatter(dots, "x", "y"), dot_rows([("row", dots)], "x")):
        assert chart.count("<title>") == chart.count("reach") == 2 and "a: 2 at 1" in chart
        assert chart.count("whisker") == 1


def test_names_in_a_crowd_touch_nothing_and_stay_inside() -> None:
    marks = [(60.0 + 7 * n, 100.0 + 3 * (n % 5)) for n in range(40)]
    edge, line = Box(50, 0, 400, 270), Box(50, 99, 400, 101)
    boxes = placed([f"model {n}" for n in range(40)], marks, [line], edge)
    found = [box for box in boxes if box]
    assert 2 < len(found) < 40 and all(box.inside(edge) for box in found)
    others = [line, *(Box(x - 4, y - 4, x + 4, y + 4) for x, y in marks)]
    for n, box in enumerate(found):
        assert not any(box.touches(other) for other in (*others, *found[:n]))


def test_a_long_name_keeps_both_ends_and_wide_letters_count_twice() -> None:
    assert shortened("a" * 20 + "b" * 20, 9) == "aaaa…bbbb" and shortened("short") == "short"
    assert width_of("蒸留") == 2 * width_of("ab")
