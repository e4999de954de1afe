"""Charts and page pieces: numbers in, well-formed, escaped, self-contained HTML out."""

import base64
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from beitforge.pipeline.reports import components
from beitforge.pipeline.reports.charts import Series, line_chart, linear_axis, log_axis, thin
from beitforge.pipeline.reports.components import Block, Card, Figure, Section, Tick
from beitforge.pipeline.runs.formatting import number

HOSTILE = "</script><script>alert('x')</script>\"&<b>"
IMAGE = Figure(b"x", "png", HOSTILE, True)
VOID = {"meta", "link", "img", "br"}


class Balanced(HTMLParser):
    """Complains when a tag is closed that is not the one open."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def assert_well_formed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []


def svg_of(chart):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", chart, re.DOTALL).group())


def paths(chart, kind):
    return [p.get("d") for p in svg_of(chart).iter("path") if kind in p.get("class").split()]


def numbers_of(chart):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', chart).group(1))


def values_of(packed):
    """Floats of 24 bits, as the page's script reads them."""
    pieces = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(-1, 3)
    return np.concatenate([np.zeros((len(pieces), 1), np.uint8), pieces], axis=1).view("<f4").ravel()


def steps_of(runs):
    return list(itertools.accumulate(np.repeat(runs[::2], runs[1::2]).tolist()))


def line(points, **settings):
    return Series(name="train", points=points, **settings)


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_evenly_spaced_and_inside(seed):
    draw = random.Random(seed)
    middle, spread = draw.uniform(-1, 1) * 10 ** draw.uniform(-6, 8), 10 ** draw.uniform(-6, 8)
    axis = linear_axis([middle - spread, middle + spread], zero=draw.random() < 0.5)
    assert axis.low <= middle - spread and middle + spread <= axis.high
    assert all(axis.low - 1e-9 * spread <= tick <= axis.high + 1e-9 * spread for tick in axis.ticks)
    assert 3 <= len(axis.ticks) <= 7
    step = axis.ticks[1] - axis.ticks[0]
    assert all(b - a == pytest.approx(step, rel=1e-4) for a, b in itertools.pairwise(axis.ticks))
    assert f"{step:.6e}"[:5] in ("1.000", "2.000", "2.500", "5.000")


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-12, 1e12])
def test_a_single_value_still_has_an_axis(value):
    for axis in (linear_axis([value]), linear_axis([value, value], zero=True)):
        assert axis.low < axis.high and axis.low <= value <= axis.high and len(axis.ticks) >= 2


def test_log_ticks_lie_inside():
    axis = log_axis([0.03, 2e5])
    assert axis.ticks == [0.1, 10.0, 1000.0, 100000.0]
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == pytest.approx(1)
    assert log_axis([0.9, 60]).ticks == [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    assert len(log_axis([1.2, 1.9]).ticks) >= 2


@pytest.mark.parametrize(
    ("value", "settings", "text"),
    [
        (0, {}, "0"),
        (1234, {}, "1,234"),
        (45000, {}, "45k"),
        (187500, {}, "187.5k"),
        (2.5e6, {}, "2.5M"),
        (0.0015, {}, "0.0015"),
        (1e-5, {}, "1e-5"),
        (-3.25, {}, "-3.25"),
        (0.2466, {"percent": True}, "24.7%"),
        (0.2, {"percent": True, "step": 0.1}, "20%"),
        (0.005, {"percent": True, "step": 0.005}, "0.5%"),
        (math.inf, {}, "not finite"),
    ],
)
def test_numbers_for_people(value, settings, text):
    assert number(value, **settings) == text


@pytest.mark.parametrize("count", [1, 299, 300, 301, 20_000])
def test_thinning_keeps_every_extreme_and_the_order(count):
    draw = random.Random(count)
    points = [(20.0 * i, draw.gauss(0, 1)) for i in range(count)]
    columns = thin(points, points[-1][0])
    assert len(columns) <= 300 and (count > 300 or [(c.x, c.mean) for c in columns] == points)
    assert max(c.high for c in columns) == max(y for _, y in points)
    assert min(c.low for c in columns) == min(y for _, y in points)
    assert all(a.x < b.x for a, b in itertools.pairwise(columns))
    assert all(c.low <= c.mean <= c.high for c in columns)


def test_a_curve_passes_through_its_points():
    chart = line_chart("Loss", [line([(0, 0.0), (50, 10.0), (100, 5.0)])], zero=True)
    (path,) = paths(chart, "line")
    top = linear_axis([0.0, 10.0], zero=True).high
    expected = [(0, 1000), (500, 1000 * (1 - 10 / top)), (1000, 1000 * (1 - 5 / top))]
    found = [tuple(map(float, place.split())) for place in path[1:].split("L")]
    assert found == [pytest.approx(place, abs=0.06) for place in expected]
    assert values_of(numbers_of(chart)["lines"][0]["y"]).tolist() == [0.0, 10.0, 5.0]
    assert "from 0 at step 0 to 5 at step 100" in svg_of(chart).get("aria-label")


def test_values_that_are_not_finite_break_the_line_and_are_counted():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 2.0), (6, -math.inf), (7, 1.5), (8, 1.0)]
    chart = line_chart("Gradient norm", [line(points)])
    assert len(paths(chart, "line")) == 3 and "<b>3 not finite</b>" in chart
    assert "NaN" not in chart and "Infinity" not in chart
    assert line_chart("Loss", [line([(1, math.nan)]), line([])]) == ""


def test_a_long_series_is_a_band_and_small():
    draw = random.Random(0)
    points = [(20.0 * i, 5 + draw.random()) for i in range(30_000)]
    points[17_000] = (points[17_000][0], 99.0)
    chart = line_chart("Loss", [line(points)])
    assert len(paths(chart, "band")) == 1 and len(chart) < 40_000
    assert max(linear_axis([5, 99]).ticks) > 60, "the axis has room for the spike"
    assert len(line_chart("Loss", [line([(0, 1.0), (1, 2.0)])])) < 2_000


def test_restarts_references_and_legend():
    series = [line([(0, 1.0), (100, 0.5)]), Series(name="level", points=[(0, 2.0), (100, 2.0)], tone=0, dashed=True)]
    chart = line_chart("Loss", series, marks=[25.0, 50.0], wide=True)
    (marks,) = paths(chart, "mark")
    assert marks == "M250.0 0V1000M500.0 0V1000"
    assert 'class="mark">restart<' in chart and 'class="t0 dashed">level<' in chart
    assert "legend" not in line_chart("Loss", series[:1])


def test_a_logarithmic_chart_of_something_not_positive_is_linear():
    assert ">0.1<" in line_chart("Norm", [line([(0, 0.1), (1, 1e4)])], log=True)
    assert ">5,000<" in line_chart("Norm", [line([(0, 0.0), (1, 1e4)])], log=True)


@pytest.mark.parametrize(
    "html",
    [
        components.page(HOSTILE, []),
        components.header(HOSTILE, HOSTILE, HOSTILE, True, HOSTILE, HOSTILE).html,
        components.section(HOSTILE, HOSTILE, HOSTILE, "<p>x</p>").html,
        components.notes([HOSTILE]),
        components.cards([Card(HOSTILE, HOSTILE, HOSTILE)]).html,
        components.table([HOSTILE], [[HOSTILE]]),
        components.table([], [[HOSTILE, HOSTILE]]),
        components.table([HOSTILE], [[HOSTILE, HOSTILE]], {(0, 1)}),
        components.neighbour_row(
            HOSTILE, Figure(b"x", "png", HOSTILE, True), [(HOSTILE, [Figure(b"x", "jpg", HOSTILE, False)])]
        ),
        components.bars([HOSTILE], [(HOSTILE, [0.5])]),
        components.strip(HOSTILE, [Block(0.0, 1.0, HOSTILE)], [Tick(0.5, HOSTILE, HOSTILE)], HOSTILE, HOSTILE),
        components.image_row(HOSTILE, HOSTILE, [IMAGE]),
        components.folds([(HOSTILE, HOSTILE, "")]),
        components.code(HOSTILE),
        components.footer(HOSTILE).html,
        line_chart(HOSTILE, [Series(name=HOSTILE, points=[(0, 1.0)]), line([(0, 1.0)])], unit=HOSTILE, marks=[1.0]),
    ],
)
def test_text_is_escaped_everywhere(html):
    assert_well_formed(html)
    assert "<script>alert" not in html and HOSTILE not in html and "alert('x')</script>" not in html


def test_a_page_asks_for_nothing_outside_itself():
    chart = line_chart("Loss", [line([(0, 1.0), (1, 2.0)])])
    image = components.image_row("a", "", [Figure(b"x", "jpg", "view", False)])
    html = components.page("run", [Section("all", components.charts([chart]) + components.image_grid([image]))])
    assert_well_formed(html)
    assert "default-src 'none'" in html and "data:image/jpeg;base64,eA==" in html
    assert re.findall(r'(?:src|href)\s*=\s*"(?!data:)', html) == []
    assert "@import" not in html and "url(" not in html and "fetch(" not in html


def test_nothing_makes_nothing():
    assert (
        components.notes([])
        == components.charts([""])
        == components.image_grid([])
        == components.section("name", "Title", "about", "", "").html
        == ""
    )


def test_bytes_of_a_file_name_that_are_no_text_do_not_stop_a_page():
    assert "caf\\udce9.jpg" in components.page("run", [Section("x", components.code("caf\udce9.jpg"))])


@pytest.mark.parametrize("count", [1, 7, 4000, 4001, 30_000])
def test_what_is_embedded_is_more_than_what_is_drawn(count):
    """Every point up to 4,000; of more, 2,000 means with their ranges. Values keep more than four digits."""
    draw = random.Random(count)
    points = [(float(7 * i + 3), draw.choice([1e-6, 1.0, 1e5]) * draw.gauss(0, 1)) for i in range(count)]
    (embedded,) = numbers_of(line_chart("Norm", [line(points)]))["lines"]
    xs, ys = steps_of(embedded["x"]), values_of(embedded["y"])
    if count <= 4000:
        assert xs == [x for x, _ in points] and "low" not in embedded
        assert len(embedded["x"]) <= 4, "steps that are evenly spaced take no room"
        assert ys == pytest.approx([y for _, y in points], rel=2e-5)
    else:
        assert len(xs) == len(ys) <= 2000 and len(xs) > 1900
        assert values_of(embedded["high"]).max() == pytest.approx(max(y for _, y in points), rel=2e-5)
        assert values_of(embedded["low"]).min() == pytest.approx(min(y for _, y in points), rel=2e-5)


def test_values_that_no_float_holds_are_embedded_as_gaps():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 1e300), (4, 2.0)]
    (embedded,) = numbers_of(line_chart("Norm", [line(points)]))["lines"]
    assert np.isfinite(values_of(embedded["y"])).tolist() == [True, False, False, False, True]


def test_a_served_page_may_connect_to_its_own_server_alone():
    html = components.page("run", [], connect="'self'", script="start();")
    assert "default-src 'none'" in html and "; connect-src 'self'\"" in html
    assert html.index("function start(") < html.index("<script>start();</script>")
    assert "connect-src" not in components.page("run", [])
