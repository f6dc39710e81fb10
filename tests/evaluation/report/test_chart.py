import re
from itertools import pairwise

import pytest

from evaluation.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw_chart, format_number
from evaluation.report.curves import Panel, Point, Series


def chart(*series, linear=False, several=False, last_step=100):
    return draw_chart(Panel("Loss & more", "nats", series, ("train/loss",), linear), several, last_step)


def line(values, run=0, kind="", **changes):
    points = tuple(Point(100 * number / (len(values) - 1), *value) for number, value in enumerate(values))
    return Series(run, f"run {run}", kind, points, **changes)


def coordinates(drawn):
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'points="(.*?)"', drawn)[1].split()]


def test_a_line_spans_the_axes():
    (x0, y0), (x1, y1) = coordinates(chart(line([(1.0,), (3.0,)])))
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    height = HEIGHT - BOTTOM - TOP
    assert y1 == pytest.approx(TOP + 0.05 / 1.1 * height, abs=0.2)  # high values are up, with a margin of 5 %
    assert y0 == pytest.approx(HEIGHT - BOTTOM - 0.05 / 1.1 * height, abs=0.2)


def test_values_of_different_sizes_get_a_logarithmic_axis_unless_it_is_linear():
    values = line([(1.0,), (10.0,), (100.0,)])
    ys = [y for _, y in coordinates(chart(values))]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    ys = [y for _, y in coordinates(chart(values, linear=True))]
    assert ys[1] - ys[2] == pytest.approx(10 * (ys[0] - ys[1]), rel=0.02)


def test_a_high_start_is_cut_off_with_a_note():
    values = [(10.0,), *((1 + number / 100,) for number in range(100))]
    drawn = chart(line(values))
    assert "The start is cut off: its values reach 10." in drawn
    assert coordinates(drawn)[0][1] < 0  # outside the inner picture, which clips it
    assert "cut off" not in chart(line(values[1:]))


def test_the_description_and_table_hold_the_values():
    drawn = chart(line([(3.0,), (1.0,), (2.0, 0.5)]))
    assert "from 3 at step 0 to 2 ± 0.5 at step 100, lowest 1 at step 50, highest 3 at step 0" in drawn
    assert "Loss &amp; more (nats)" in drawn
    assert re.findall(r"<td>(.*?)</td>", drawn) == ["3", "1", "2 ± 0.5"]


def test_error_bars_reach_from_below_to_above():
    drawn = chart(line([(2.0, 1.0), (2.0, 0.25)], marked=True))
    bars = [tuple(map(float, pair)) for pair in re.findall(r'class="bar s0" d="M[\d.]+ ([\d.]+)V([\d.]+)', drawn)]
    lengths = [low - high for low, high in bars]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=0.02)
    assert lengths[0] > 100


def test_numbers_of_runs_do_not_overlap():
    drawn = chart(*(line([(1.0,), (2.0,)], run) for run in range(5)), several=True)
    heights = [float(y) for y in re.findall(r'class="tag t\d" x="[\d.]+" y="([-\d.]+)"', drawn)]
    assert len(heights) == 5
    assert min(b - a for a, b in pairwise(sorted(heights))) >= 12
    assert TOP <= min(heights) < max(heights) <= HEIGHT - BOTTOM


def test_constant_and_single_values_can_be_drawn():
    for values in ([(0.0,), (0.0,)], [(-5.0,), (-5.0,)], [(1e-30,), (1e30,)]):
        assert all(0 <= y <= HEIGHT for _, y in coordinates(chart(line(values), linear=True)))
    assert 'class="mark s0"' in chart(Series(0, "x", "", (Point(0, 1.0),), marked=True), last_step=0)
    assert "No value is finite." in chart(Series(0, "x", "", (), missing=3))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.04098, "0.04098"),
        (1234.6, "1,235"),
        (1e-5, "1e-05"),
        (123456.0, "1.23e+05"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert format_number(value) == text
