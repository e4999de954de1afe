"""Line charts as text: an SVG that stretches with the page, and labels in HTML beside it that keep their size.

Knows numbers and words, not runs. Colours are the page's CSS variables; the numbers are embedded for its script.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_COLUMNS = 300  # a longer series is drawn as the mean and range of so many columns
_SIDE = 1000  # units of the SVG, either way
_DOTS = 40  # a series of at most so many points shows each


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
) -> str:
    """A <figure> with the curves, or "" when no series has a finite value.

    marks: x of vertical lines. percent: values are shares. zero: the axis begins at 0. log: logarithmic, as long as
    every value is positive. Values that are not finite break the line and are counted below the chart. The legend names
    marks on a wide chart only.
    """
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    x_axis = linear_axis([0.0, *(x for x, _ in finite)], zero=True, pad=0.0)
    values = [y for _, y in finite]
    log = log and min(values) > 0
    y_axis = log_axis(values) if log else linear_axis(values, zero=zero)
    drawn = [(line, thin(line.points, x_axis.high)) for line in series if line.points]
    missing = sum(not math.isfinite(y) for line in series for _, y in line.points)
    note = f"<b>{missing:,} not finite</b>" if missing else "<span></span>"
    legend = _legend(series, mark_name if marks and wide else "")
    return (
        f'<figure class="chart{" wide" if wide else ""}">'
        f"<figcaption><h3>{escape(title)}{_unit(unit)}</h3>{legend}</figcaption>"
        f'<div class="plot">{_y_labels(y_axis, percent)}<div class="area">'
        f"{_svg(title, drawn, x_axis, y_axis, marks)}</div>{_x_labels(x_axis)}"
        f'<div class="xname">{note}<span aria-hidden="true">step</span></div></div>'
        f'<script type="application/json">{_numbers(drawn, x_axis, y_axis, percent)}</script></figure>'
    )


def thin(points: Sequence[tuple[float, float]], x_high: float) -> list[Column]:
    """One column a point where there is room for all; else the mean and range of each of _COLUMNS equal parts."""
    if len(points) <= _COLUMNS:
        return [Column(x, y, y, y) if math.isfinite(y) else Column(x, *[math.nan] * 3) for x, y in points]
    parts: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        parts.setdefault(int(x / x_high * (_COLUMNS - 1)), []).append((x, y))
    columns = []
    for part in parts.values():
        x = sum(x for x, _ in part) / len(part)
        values = [y for _, y in part if math.isfinite(y)] or [math.nan]
        columns.append(Column(x, math.fsum(values) / len(values), min(values), max(values)))
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


def number(value: float, *, percent: bool = False, step: float = 0.0) -> str:
    """For people: 1,234 · 0.25 · 45k · 1.5e-5 · 12%. `step`: the distance of ticks, which fixes the decimals."""
    if not math.isfinite(value):
        return "not finite"
    if percent:
        decimals = max(0, -math.floor(math.log10(step * 100) + 1e-9)) if step else 1
        return f"{value * 100:.{decimals}f}%"
    size = abs(value)
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.4g}{suffix}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits, _, power = f"{value:.4g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def _unit(unit: str) -> str:
    return f' <span class="unit">{escape(unit)}</span>' if unit else ""


def _legend(series: Sequence[Series], mark_name: str) -> str:
    items = [
        f'<li class="t{line.tone}{" dashed" if line.dashed else ""}">{escape(line.name)}</li>'
        for line in series
        if line.points and len(series) > 1
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
    spans = [
        f'<span style="left:{100 * axis.place(tick):.2f}%">{escape(number(tick))}</span>'
        for tick in axis.ticks
        if axis.place(tick) < 0.97 or tick == axis.ticks[-1]
    ]
    return f'<div class="x" aria-hidden="true">{"".join(spans)}</div>'


def _svg(
    title: str, drawn: Sequence[tuple[Series, list[Column]]], x_axis: Axis, y_axis: Axis, marks: Sequence[float]
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
    said = escape(_said(title, drawn), quote=True)
    return (
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" aria-label="{said}">'
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


def _said(title: str, drawn: Sequence[tuple[Series, list[Column]]]) -> str:
    """The chart in one sentence, for those who do not see it."""
    said = []
    for line, columns in drawn:
        ends = [c for c in columns if math.isfinite(c.mean)]
        if ends and line.dashed:
            said.append(f"{line.name} {ends[0].mean:.4g}")
        elif ends:
            first, last = ends[0], ends[-1]
            said.append(
                f"{line.name} from {first.mean:.4g} at step {first.x:.0f} to {last.mean:.4g} at step {last.x:.0f}"
            )
    return f"{title}: {'; '.join(said)}"


def _numbers(drawn: Sequence[tuple[Series, list[Column]]], x_axis: Axis, y_axis: Axis, percent: bool) -> str:
    """What the page's script reads values from. `<` is escaped, so nothing in it can end the script element."""
    lines = []
    for line, columns in drawn:
        shown = [c for c in columns if math.isfinite(c.mean)]
        values = [float(f"{c.mean:.5g}") for c in shown]
        places = [round(1 - y_axis.place(c.mean), 4) for c in shown]
        xs = [round(c.x) for c in shown]
        lines.append({"name": line.name, "tone": line.tone, "fixed": line.dashed, "x": xs, "y": values, "at": places})
    content = {"low": x_axis.low, "high": x_axis.high, "percent": percent, "lines": lines}
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
