"""Every setting with its default, range, unit and meaning, for the terminal and for docs/settings.md.

Written from the fields of pipeline/config/settings.py. Must not know any setting by name.
"""

import dataclasses
import difflib
import textwrap
import typing
from typing import Any

from beitforge.pipeline.config.fields import Duration, Rule, Size
from beitforge.pipeline.config.loading import words_of
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.errors import ConfigError

_WIDTH = 100
_TYPES = {str: "text", bool: "true or false", int: "integer", float: "number", Size: "size", Duration: "duration"}
_INTRODUCTION = """# Settings

Written by `beitforge settings --markdown`; the source is `pipeline/config/settings.py` and
`pipeline/config/run_settings.py`. A YAML file sets them by section, and `section.key=value` on the command line
overrides the file.

- A *duration* is a number and a unit: `300 epochs`, `10000 steps` or `5000000 samples`.
- A *size* is `224` (square) or `224x288` (height and width).
- **run**: part of a run's identity; a run folder refuses another value where its verb uses the section.
- **free**: may change when a run resumes.
- **host**: free, and each host of a run may have its own value.
"""


def text(section: str) -> str:
    """One section, or all where it is empty, in lines of at most 100 columns. Raises ConfigError if there is none."""
    sections = _sections()
    if section and section not in sections:
        near = difflib.get_close_matches(section, sections, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sections)}"
        raise ConfigError(f"section {section!r} is unknown; {hint}")
    return "\n\n".join(_section_text(name, sections[name]) for name in sections if section in ("", name))


def markdown() -> str:
    """The page docs/settings.md: one table a section."""
    return "\n".join([_INTRODUCTION, *(_section_table(name, kind) for name, kind in _sections().items())]).rstrip()


def _sections() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def _section_text(name: str, kind: Any) -> str:
    lines = [f"{name}: {_summary(name, kind)}"]
    lines = textwrap.wrap(lines[0], _WIDTH)
    if name == "deepspeed":
        return "\n".join(lines)
    for item in dataclasses.fields(kind):
        rule: Rule = item.metadata["rule"]
        default = _shown(item.default)
        facts = [_kind(kind, item.name), _range(rule), _scope(rule)]
        lines.append(f"  {name}.{item.name} = {default or '(empty)'}   [{' | '.join(fact for fact in facts if fact)}]")
        lines += textwrap.wrap(rule.doc, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _section_table(name: str, kind: Any) -> str:
    lines = [f"## {name}", "", _summary(name, kind), ""]
    if name == "deepspeed":
        return "\n".join(lines)
    lines += ["| setting | default | type | range | scope | meaning |", "|---|---|---|---|---|---|"]
    for item in dataclasses.fields(kind):
        rule: Rule = item.metadata["rule"]
        default = f"`{_shown(item.default)}`" if item.default != "" else "empty"
        cells = (f"`{item.name}`", default, _kind(kind, item.name), _range(rule), _scope(rule), rule.doc)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _summary(name: str, kind: Any) -> str:
    """What a section is, from the docstring of its class."""
    if name == "deepspeed":
        return "Keys of DeepSpeed's own JSON, which override everything derived from the other sections."
    return " ".join(kind.__doc__.split())


def _kind(section: Any, name: str) -> str:
    kind = typing.get_type_hints(section)[name]
    if words := words_of(kind):
        return f"number or {' or '.join(words)}"
    return _TYPES.get(kind, "list of 3 numbers")


def _range(rule: Rule) -> str:
    return " ".join(part for part in (rule.range(), rule.unit) if part)


def _scope(rule: Rule) -> str:
    return "host" if rule.per_host else "run" if rule.identity else "free"


def _shown(value: object) -> str:
    """A default as YAML takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Duration | Size):
        return str(value)
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
