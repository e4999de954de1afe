"""Line charts as text: an SVG that stretches with the page, and labels in HTML next to it that keep their size.

Knows numbers and words, not runs. Colours are the page's CSS variables. The numbers are embedded, in more detail than
is drawn, for the page's script, which redraws the part zoomed into (pipeline/reports/assets/charts.js).
"""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from beitforge.pipeline.runs.formatting import number

_COLUMNS = 300  # a longer series is drawn as the mean and range of this many columns
_KEPT = 4000  # a series of at most this many points is embedded whole, a longer one as
_PARTS = 2000  # the mean and range of this many parts
_SIDE = 1000  # units of the SVG, either way
_DOTS = 40  # a series of at most this many points shows each


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (x, y) in order of x; `tone` is its colour, 1 … 6. A dashed one is a reference to compare with."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 1
    dashed: bool = False


@dataclass(frozen=True)
class Column:
    """What is drawn at one x: the mean of the finite values there and their range; NaN when none is finite."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """A range of values and the ticks in it."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    marks: Sequence[float] = (),
    mark_name: str = "restart",
    percent: bool = False,
    zero: bool = False,
    log: bool = False,
    wide: bool = False,
    named: bool = False,
    x_name: str = "step",
    x_high: float = 0.0,
) -> str:
    """A <figure> with the curves, or "" when no series has a finite value.

    marks: x of vertical lines. percent: values are shares. zero: the axis begins at 0. log: logarithmic, as long as
    every value is positive. x_high: where the axis ends at least. Values that are not finite break the line and are
    counted below the chart. The legend names marks on a wide chart only, and a single series where `named`. All charts
    of a page but those over layers are zoomed together.
    """
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    x_axis = linear_axis([0.0, x_high, *(x for x, _ in finite)], zero=True, pad=0.0)
    values = [y for _, y in finite]
    log = log and min(values) > 0
    y_axis = log_axis(values) if log else linear_axis(values, zero=zero)
    drawn = [(line, thin(line.points, x_axis.high)) for line in series if line.points]
    shape = {"x": x_name, "high": x_axis.high, "percent": percent, "log": y_axis.log, "marks": list(marks)}
    shape["axis"] = {"low": y_axis.low, "high": y_axis.high}
    shape["lines"] = [_embedded(line, x_axis.high) for line, _ in drawn]
    missing = sum(not math.isfinite(y) for line in series for _, y in line.points)
    note = f"<b>{missing:,} not finite</b>" if missing else "<span></span>"
    legend = _legend(series, mark_name if marks and wide else "", named or len(series) > 1)
    return (
        f'<figure class="chart{" wide" if wide else ""}">'
        f"<figcaption><h3>{escape(title)}{_unit(unit)}</h3>{legend}</figcaption>"
        f'<div class="plot">{_y_labels(y_axis, percent)}<div class="area">'
        f"{_svg(_said(title, drawn, x_name), drawn, x_axis, y_axis, marks)}</div>{_x_labels(x_axis)}"
        f'<div class="xname">{note}<span aria-hidden="true">{escape(x_name)}</span></div></div>'
        f'<script type="application/json">{_json(shape)}</script></figure>'
    )


def thin(points: Sequence[tuple[float, float]], x_high: float) -> list[Column]:
    """One column a point where there is room for all; else the mean and range of each of _COLUMNS equal parts."""
    return [Column(*row) for row in _parts(points, x_high, _COLUMNS, _COLUMNS).tolist()]


def _parts(points: Sequence[tuple[float, float]], x_high: float, most: int, parts: int) -> np.ndarray:
    """x, mean, low and high, f64 [n, 4]: of every point where they are at most `most`, else of `parts` equal parts of
    the axis that have points. NaN where no value is finite."""
    x, y = np.asarray(points, np.float64).reshape(-1, 2).T
    finite = np.isfinite(y)
    if len(x) <= most:
        y = np.where(finite, y, math.nan)
        return np.stack([x, y, y, y], axis=1)
    starts = np.flatnonzero(np.diff((x / x_high * (parts - 1)).astype(np.int64), prepend=-1))
    lengths = np.diff(starts, append=len(x))
    count = np.add.reduceat(finite.astype(np.int64), starts)
    empty = count == 0
    low = np.minimum.reduceat(np.where(finite, y, math.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -math.inf), starts)
    mean = np.clip(np.add.reduceat(np.where(finite, y, 0.0), starts) / np.maximum(count, 1), low, high)
    columns = np.stack([np.add.reduceat(x, starts) / lengths, mean, low, high], axis=1)
    columns[empty, 1:] = math.nan
    return columns


def linear_axis(values: Sequence[float], *, zero: bool = False, pad: float = 0.05) -> Axis:
    """Room for all the values, and about four round ticks: 1, 2, 2.5 or 5 times a power of ten apart."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(high) / 10 or 1.0
        low, high = low - (0.0 if zero else spread), high + spread
    margin = pad * (high - low)
    low, high = low - (0.0 if zero and low == 0 else margin), high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, [float(f"{number * step:.12g}") for number in range(first, last + 1)])


def log_axis(values: Sequence[float]) -> Axis:
    """Room for all the (positive) values, and ticks at 1, 2 and 5 times powers of ten, or at the powers alone."""
    low, high = min(values) / 1.1, max(values) * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:
        inside = [tick for tick in linear_axis([low, high]).ticks if low <= tick <= high]
    every = -(-len(inside) // 6) if factors == (1,) else 1
    return Axis(low, high, inside[::every], log=True)


def _unit(unit: str) -> str:
    return f' <span class="unit">{escape(unit)}</span>' if unit else ""


def _legend(series: Sequence[Series], mark_name: str, named: bool) -> str:
    items = [
        f'<li class="t{line.tone}{" dashed" if line.dashed else ""}">{escape(line.name)}</li>'
        for line in series
        if line.points and named
    ]
    if mark_name:
        items.append(f'<li class="mark">{escape(mark_name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _y_labels(axis: Axis, percent: bool) -> str:
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 0.0
    labels = [number(tick, percent=percent, step=step) for tick in axis.ticks]
    spans = [
        f'<span style="top:{100 * (1 - axis.place(tick)):.2f}%">{escape(label)}</span>'
        for tick, label in zip(axis.ticks, labels, strict=True)
    ]
    width = max((len(label) for label in labels), default=1)
    return f'<div class="y" style="width:{width + 1.4}ch" aria-hidden="true">{"".join(spans)}</div>'


def _x_labels(axis: Axis) -> str:
    """At whole numbers: there is no half a step."""
    ticks = [tick for tick in axis.ticks if tick == round(tick)]
    spans = [
        f'<span style="left:{100 * axis.place(tick):.2f}%">{escape(number(tick))}</span>'
        for tick in ticks
        if axis.place(tick) < 0.97 or tick == ticks[-1]
    ]
    return f'<div class="x" aria-hidden="true">{"".join(spans)}</div>'


def _svg(
    said: str, drawn: Sequence[tuple[Series, list[Column]]], x_axis: Axis, y_axis: Axis, marks: Sequence[float]
) -> str:
    def at(x: float, y: float) -> str:
        return f"{_SIDE * x_axis.place(x):.1f} {_SIDE * (1 - y_axis.place(y)):.1f}"

    grid = "".join(f"M0 {_SIDE * (1 - y_axis.place(tick)):.1f}H{_SIDE}" for tick in y_axis.ticks)
    parts = [f'<path class="grid" d="{grid}"/>']
    if marks:
        restarts = "".join(f"M{_SIDE * x_axis.place(min(x, x_axis.high)):.1f} 0V{_SIDE}" for x in marks)
        parts.append(f'<path class="mark" d="{restarts}"/>')
    for line, columns in drawn:
        style = f"t{line.tone}{' dashed' if line.dashed else ''}"
        for run in _runs(columns):
            if any(column.high > column.low for column in run):
                edge = [at(c.x, c.high) for c in run] + [at(c.x, c.low) for c in reversed(run)]
                parts.append(f'<path class="band {style}" d="M{"L".join(edge)}Z"/>')
            path = "L".join(at(c.x, c.mean) for c in run)
            parts.append(f'<path class="line {style}" d="M{path}{"h0" if len(run) == 1 else ""}"/>')
        if len(columns) <= _DOTS and not line.dashed:
            dots = "".join(f"M{at(c.x, c.mean)}h0" for c in columns if math.isfinite(c.mean))
            parts.append(f'<path class="dots {style}" d="{dots}"/>')
    return (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">'
        f"{''.join(parts)}</svg>"
    )


def _runs(columns: Sequence[Column]) -> Iterator[list[Column]]:
    """The unbroken pieces of a line."""
    run: list[Column] = []
    for column in columns:
        if math.isfinite(column.mean):
            run.append(column)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _said(title: str, drawn: Sequence[tuple[Series, list[Column]]], x_name: str) -> str:
    """The chart in one sentence, for those who do not see it."""
    said = []
    for line, columns in drawn:
        ends = [c for c in columns if math.isfinite(c.mean)]
        if ends and line.dashed:
            said.append(f"{line.name} {ends[0].mean:.4g}")
        elif ends:
            first, last = ends[0], ends[-1]
            begun, ended = (f"{c.mean:.4g} at {x_name} {c.x:.0f}" for c in (first, last))
            said.append(f"{line.name} from {begun} to {ended}")
    return f"{title}: {'; '.join(said)}"


def _embedded(line: Series, x_high: float) -> dict:
    """What the page's script draws and reads a series from: see `_steps` and `_packed`."""
    x, mean, low, high = _parts(line.points, x_high, _KEPT, _PARTS).T
    content = {"name": line.name, "tone": line.tone, "fixed": line.dashed, "x": _steps(x), "y": _packed(mean)}
    return content | ({"low": _packed(low), "high": _packed(high)} if len(line.points) > _KEPT else {})


def _steps(x: np.ndarray) -> list[int]:
    """Distances from one x to the next, the first from 0, each with how often it comes in a row."""
    distances = np.diff(np.rint(x).astype(np.int64), prepend=0)
    starts = np.flatnonzero(np.diff(distances, prepend=distances[:1] - 1))
    lengths = np.diff(starts, append=len(distances))
    return np.stack([distances[starts], lengths], axis=1).ravel().tolist()


def _packed(values: np.ndarray) -> str:
    """Floats of 24 bits (float32 without its lowest byte, rounded: 4 digits and more), little-endian, base64."""
    with np.errstate(over="ignore"):
        words = values.astype("<f4").view("<u4") + np.uint32(0x80)
    return base64.b64encode(words.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()).decode("ascii")


def _json(content: dict) -> str:
    """`<` is escaped, so nothing in it can end the script element."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
