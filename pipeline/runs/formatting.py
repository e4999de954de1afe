"""Numbers, durations and times as text for people. Must not know runs."""

import math
import time


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


DURATION_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))  # also for a page's script


def duration(seconds: float) -> str:
    """3 d 4 h · 2 h 5 min · 4 min 10 s · 7 s."""
    if not math.isfinite(seconds):
        return "no time"
    total = round(max(0.0, seconds))
    for length, unit, part, part_unit in DURATION_UNITS:
        if total >= length:
            return f"{total // length} {unit} {total % length // part} {part_unit}"
    return f"{total} s"


def process_count(count: object) -> str:
    """1 process · 8 processes · ? processes."""
    return f"{count} process{'' if count == 1 else 'es'}"


def utc_time(seconds: float) -> str:
    """A time since 1970 as date and time, UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # of no calendar
        return "no time"
