"""Charts: points where they belong, round ticks, names that do not cover one another."""

import re
from itertools import pairwise

import pytest

from fedalt.report.charts import LINE, Line, _ticks, apart, heat_map, line_chart, stacked_bars
from tests.report.test_page import charts, drawings, lines_of


def test_points_lie_where_they_should():
    lines = [Line("a", [(0, 0.0), (1, 50.0), (2, 100.0), (3, float("nan"))], "c0")]
    (chart,) = charts(line_chart("score", "round", lines))
    (line,) = lines_of(chart)
    # the plot is 52 to 466 across and, upside down, 12 to 254 high
    assert line.get("points") == "52.0,254.0 259.0,133.0 466.0,12.0"
    assert line.find("title").text == "a: 0 to 100"
    assert line_chart("score", "round", [Line("a", [(0, float("nan"))], "c0")]) == ""


def test_a_line_of_one_point_is_a_dot():
    (chart,) = charts(line_chart("score", "round", [Line("a", [(0, 5.0)], "c0")]))
    (line,) = lines_of(chart)
    assert line.get("stroke-linecap") == "round"
    assert len(set(line.get("points").split())) == 1


def test_bars_are_stacked():
    (chart,) = charts(
        stacked_bars("time", "round", {1: {"train": 3.0, "save": 1.0}}, ["train", "save"])
    )
    low, high = chart.findall("rect")
    pixels = 254 - 12
    assert float(low.get("height")) == pytest.approx(pixels * 3 / 4, abs=0.1)
    assert float(high.get("height")) == pytest.approx(pixels / 4, abs=0.1)
    assert float(high.get("y")) + float(high.get("height")) == float(low.get("y"))
    assert low.find("title").text == "1, train: 3"


def test_gates_are_coloured_by_their_distance_from_one_half():
    gates = {"ann": {"model.0.q": 0.5, "model.1.q": 0.75}, "bob": {"model.1.q": 0.2}}
    html = heat_map("gates", gates, ("left", "right"))
    (chart,) = charts(html)
    cells = [rect for rect in chart.findall("rect") if rect.find("title") is not None]
    shown = [(c.find("title").text, c.get("class"), c.get("fill-opacity")) for c in cells]
    assert shown == [
        ("ann, model.0.q: 0.500", "c0", "0.00"),
        ("ann, model.1.q: 0.750", "c4", "0.83"),  # 0.25 of a reach of 0.3
        ("bob, model.1.q: 0.200", "c0", "1.00"),
    ]
    # the layers' common beginning is left out
    assert [label.text for label in chart.findall("text")] == ["0.q", "1.q", "ann", "bob"]
    assert heat_map("gates", {}, ("", "")) == heat_map("gates", {"ann": {}}, ("", "")) == ""


def test_the_gates_colours_have_a_ramp_with_numbers_and_words():
    html = heat_map("gates", {"ann": {"0.q": 0.2}}, ("left", "right"))
    ramp = drawings(html)[0]
    assert [label.text for label in ramp.findall("text")] == ["0.2", "0.5", "0.8"]
    shades = [r for r in ramp.findall("rect") if r.get("class") != "null"]
    depths = [float(shade.get("fill-opacity")) for shade in shades]
    half = len(shades) // 2
    assert [shade.get("class") for shade in shades] == ["c0"] * half + ["c4"] * half
    assert depths[:half] == sorted(depths, reverse=True)[::2]
    assert depths[half:] == depths[half - 1 :: -1]
    assert re.findall(r'class="ramp"><span>(.*?)</span>', html) == ["left"]
    assert re.findall(r"</svg><span>(.*?)</span></div>", html) == ["right"]


def test_ticks_are_round_and_hold_the_range():
    assert _ticks(0, 4.4) == [0, 1, 2, 3, 4, 5]
    assert _ticks(12.2, 74.8) == [0, 20, 40, 60, 80]
    assert _ticks(100, 100) == [80, 100]
    assert _ticks(0, 2, whole=True) == [0, 1, 2]
    assert _ticks(0, 0) == [0, 0.2]
    assert _ticks(0, 2.9999999999999996e-09) == [0, 1e-9, 2e-9, 3e-9]  # a logarithm that rounds up
    for low, high in ((0.1, 0.1003), (-3, 12345), (99.2, 100), (0, 1e-6)):
        ticks = _ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9


def test_names_stand_at_the_curves_ends_and_apart():
    lines = [
        Line(name, [(0, 0.0), (1, end)], "c0")
        for name, end in zip("abcd", (9, 9, 9, 0), strict=True)
    ]
    (chart,) = charts(line_chart("score", "round", lines))
    names = {label.text: float(label.get("y")) for label in chart.findall("text[@class='name']")}
    assert set(names) == set("abcd")
    heights = sorted(names.values())
    assert min(b - a for a, b in pairwise(heights)) >= LINE - 0.1
    assert names["d"] == max(heights)
    ends = {line.get("points").split()[-1] for line in lines_of(chart)}
    leaders = {path.get("d").split()[0].removeprefix("M") for path in chart.findall("path")}
    assert leaders == ends
    right = float(chart.get("viewBox").split()[2])
    assert all(float(t.get("x")) + 8 < right for t in chart.findall("text[@class='name']"))
    # a curve alone is named by its caption
    assert "name" not in line_chart("score", "round", lines[:1])


def test_names_move_as_little_as_it_takes():
    assert apart([]) == []
    assert apart([50, 100]) == [50, 100]
    assert apart([100, 100]) == [100 - LINE / 2, 100 + LINE / 2]
    assert apart([12, 12]) == [12, 12 + LINE]  # not above the drawing
    crowd = apart([254.0] * 30)
    assert crowd[0] >= 12
    assert crowd[-1] <= 254
    assert crowd == sorted(crowd)
