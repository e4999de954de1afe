"""What a setting declares about itself: `setting()` attaches it to a dataclass field, `find_violation` enforces it.

Imports nothing heavy. Must not know any setting by name.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from beitforge.pipeline.plain_text import shown

UNITS = ("epochs", "steps", "samples")
LARGEST = 1e12


@dataclass(frozen=True)
class Duration:
    """A length of training, written `300 epochs`, `10000 steps` or `5000000 samples`."""

    count: float
    unit: str

    def steps(self, epoch_samples: int, global_batch: int) -> int:
        """In optimizer steps of `global_batch` samples, rounded up."""
        samples = {"epochs": self.count * epoch_samples, "samples": self.count, "steps": self.count * global_batch}
        return int(-(-samples[self.unit] // global_batch))

    def __str__(self) -> str:
        return f"{self.count:.15g} {self.unit}"


class Size(NamedTuple):
    """Height and width in pixels, written `224` (square) or `224x288`."""

    height: int
    width: int

    def grid(self, stride: int) -> tuple[int, int]:
        """Rows and columns of squares of `stride` pixels."""
        return self.height // stride, self.width // stride

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The values a setting takes, its unit and meaning, and whether a run may change it."""

    doc: str
    at_least: float | None = None
    at_most: float | None = None
    more_than: float | None = None
    less_than: float | None = None
    choices: tuple = ()
    unit: str = ""
    place: str = ""  # "folder": of this machine; "shards": a folder or a URL; empty: not a place
    hint: str = ""  # ends the message that refuses a value
    identity: bool = True  # a run keeps it: another value is another run
    per_host: bool = False  # each host of a run may have its own value; never part of the identity
    apart: tuple = ()  # choices of a per-host setting that change results: then it is the whole run's, and kept
    before: tuple[tuple[str, str], ...] = ()  # what earlier versions wrote, and what it is now

    def range(self) -> str:
        """The values that are taken, as `[0, 1)`, `≥ 1` or `bf16, fp16`; empty where every value of the type is."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        if self.place:
            return "folder" if self.place == "folder" else "folder or URL"
        low = self.at_least if self.more_than is None else self.more_than
        high = self.at_most if self.less_than is None else self.less_than
        if low is not None and high is not None:
            opening, closing = "[" if self.more_than is None else "(", "]" if self.less_than is None else ")"
            return f"{opening}{_number(low)}, {_number(high)}{closing}"
        if low is not None:
            return f"{'≥' if self.more_than is None else '>'} {_number(low)}"
        return "" if high is None else f"{'≤' if self.less_than is None else '<'} {_number(high)}"


def setting(
    default: Any,
    *,
    doc: str,
    at_least: float | None = None,
    at_most: float | None = None,
    more_than: float | None = None,
    less_than: float | None = None,
    choices: tuple = (),
    unit: str = "",
    place: str = "",
    hint: str = "",
    identity: bool = True,
    per_host: bool = False,
    apart: tuple = (),
    before: tuple[tuple[str, str], ...] = (),
) -> Any:
    """A dataclass field with this default that carries its Rule."""
    rule = Rule(
        doc=doc,
        at_least=at_least,
        at_most=at_most,
        more_than=more_than,
        less_than=less_than,
        choices=choices,
        unit=unit,
        place=place,
        hint=hint,
        identity=identity and not per_host,
        per_host=per_host,
        apart=apart,
        before=before,
    )
    return dataclasses.field(default=default, metadata={"rule": rule})


def find_rules(section: object) -> dict[str, Rule]:
    """The rule of each setting of a section, a dataclass or an instance of one, in the order they are declared."""
    return {item.name: item.metadata["rule"] for item in dataclasses.fields(section)}  # type: ignore[arg-type]


def find_violation(name: str, value: Any, rule: Rule) -> str:
    """One line with the setting, its value and the rule that it breaks; empty where it breaks none."""
    if rule.choices:
        broken = "" if value in rule.choices else f"it takes {rule.range()}"
        return broken and f"{name} is {shown(value)}; {broken}"
    if rule.place:
        return _misplaced(name, value, rule)
    numbers = [value.count] if isinstance(value, Duration) else list(value) if isinstance(value, tuple) else [value]
    for number in numbers:
        end = _broken_end(number, rule) if isinstance(number, int | float) else ""
        if not end:
            continue
        interval = rule.range() if rule.range().endswith(("]", ")")) and isinstance(value, float) else ""
        must = f"it lies in {interval}" if interval else f"{_subject(value)} must be {end}"
        written = list(value) if isinstance(value, tuple) and not isinstance(value, Size) else value
        return f"{name} is {written}; {must}" + (f"; {rule.hint}" if rule.hint else "")
    return ""


def _broken_end(number: float, rule: Rule) -> str:
    """The end of the range that a number lies beyond, in words; empty where it lies inside. No number is larger than
    LARGEST, unless its rule says so: products of settings must stay numbers."""
    if rule.at_least is not None and number < rule.at_least:
        return f"at least {_number(rule.at_least)}"
    if rule.more_than is not None and number <= rule.more_than:
        return f"more than {_number(rule.more_than)}"
    if rule.at_most is not None and number > rule.at_most:
        return f"at most {_number(rule.at_most)}"
    if rule.less_than is not None and number >= rule.less_than:
        return f"less than {_number(rule.less_than)}"
    if abs(number) > LARGEST and rule.at_most is None and rule.less_than is None:
        return f"at most {_number(LARGEST)}, as any setting"
    return ""


def _subject(value: object) -> str:
    return "each" if isinstance(value, tuple) and not isinstance(value, Size) else "it"


def _misplaced(name: str, where: str, rule: Rule) -> str:
    if where.startswith("-"):
        return f"{name} is {where}, which programs would take for an option; write ./{where}"
    if rule.place == "folder":
        return f"{name} is {where}, a URL; it must be a folder of this machine" if "://" in where else ""
    scheme, colon, rest = where.partition(":/")
    wrong = colon and scheme.isalnum() and not (rest.startswith("/") and rest.strip("/"))
    return f"{name} is {where}; a URL is written SCHEME://PLACE" if wrong else ""


def _number(value: float) -> str:
    """64-bit limits as powers of two, any other number as it is."""
    return {2**63: "2^63", -(2**63): "-2^63"}.get(value, f"{value:.15g}")  # type: ignore[call-overload]
