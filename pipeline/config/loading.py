"""Settings from YAML and `section.key=value` overrides, and back. The settings themselves are pipeline.config.settings.

A mistake gets one line: where, the value, the rule, the nearest name. Imports nothing heavy. Must not know torch,
shards or any stage.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Any

from beitforge.pipeline.config.fields import UNITS, Duration, Size, find_rules
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.config.validation import validate
from beitforge.pipeline.config.yaml_text import LARGEST, read_yaml, write_yaml
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import plain, shown
from beitforge.pipeline.reading import OddFile, read_text, refuse_deep

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"  # of the checkout, or in the installed package
_NAME = 100  # characters of a name that others are compared with
_DIGITS = 64  # of a number that a person types
_SIDE = re.compile(r" *[0-9]{1,9} *")
_PARTS = 5_000  # keys and values of the deepspeed section


def load_config(path: str, overrides: list[str], within: Path | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check. Raises ConfigError with one line.

    path: a file, or the name of one that comes with the package: `beit_base`, `configs/beit_base.yaml`. within: the
    folder that the file must lie in once links are followed, of a run that somebody else may have made.
    """
    plain(path, "CONFIG")
    try:
        content = read_yaml(read_text(_find_config(path), LARGEST, within))
    except FileNotFoundError as error:
        names = ", ".join(sorted(config.stem for config in _CONFIGS.glob("*.yaml")))
        raise ConfigError(f"{path} does not exist; give a YAML file, or one of {names}") from error
    except OddFile:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must hold sections (data:, model:, …), not a {type(content).__name__}")
    return load_dict(content or {}, overrides, path)


def _find_config(path: str) -> Path:
    """The file itself where it exists; else the package's own of that name."""
    given, own = Path(path), _CONFIGS / f"{Path(path).stem}.yaml"
    named = given.parent.name in ("", "configs") and given.suffix in ("", ".yaml")
    return own if named and not given.exists() and own.exists() else given


def load_dict(tree: dict, overrides: list[str], where: str) -> Config:
    """Nested dicts with `section.key=value` overrides, checked. `where` names the source in errors."""
    for override in overrides:
        _override(tree, override)
    return from_dict(tree, where)


def _override(tree: dict, override: str) -> None:
    what = f"override {shown(override)}:"
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"{what} write section.key=value, for example train.zero_stage=3")
    _known(keys[0], Config, f"{what} section")
    if keys[0] != "deepspeed":
        _known(keys[1], _field_types(Config)[keys[0]], what)
    for key in keys[:-1]:
        tree[key] = {} if tree.get(key) is None else tree[key]
        tree = tree[key]
        if not isinstance(tree, dict):
            raise ConfigError(f"{what} {key[:_NAME]} is a value, not a section")
    tree[keys[-1]] = _yaml_value(text, f"override {shown(override)}") if keys[0] == "deepspeed" else _Typed(text)


class _Typed(str):
    """The text of an override as it was typed: a text setting takes it as it is, any other as YAML."""


def _yaml_value(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {shown(str(text))} is not a YAML value: {error}") from error


def from_dict(tree: dict, where: str) -> Config:
    """A checked Config from nested dicts, as read from YAML or JSON. `where` names the source in errors."""
    sections: dict[str, Any] = {}
    for name, value in tree.items():
        _known(name, Config, f"{where}: section")
        if name == "deepspeed":
            if not isinstance(value, dict | None):
                own = "deepspeed must be a mapping as in DeepSpeed's own JSON"
                raise ConfigError(f"{where}: {own}, not {shown(value)}")
            sections[name] = value or {}
            refuse_unplain(sections[name], f"{where}: deepspeed")
            continue
        if not isinstance(value, dict | None):
            raise ConfigError(f"{where}: {name} is a section of settings, not {shown(value)}")
        sections[name] = _section(_field_types(Config)[name], value or {}, f"{where}: {name}")
    config = Config(**sections)
    validate(config, where)
    return config


def refuse_unplain(section: dict, where: str) -> None:
    """Raise ConfigError where free-form settings hold what no JSON for people does: keys that are no text, control
    characters, numbers that are not finite, more than 32 levels or 5,000 parts."""
    try:
        refuse_deep(section)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    waiting, count = [(where, section)], 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if count > _PARTS:
            raise ConfigError(f"{where} has more than {_PARTS:,} keys and values")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"{name}: the key {shown(key)} is no text; write it in quotes")
                plain(key, f"{name}: a key")
            waiting += [(f"{name}.{key}"[-_NAME:], inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, str):
            plain(value, name)
        elif value is not None and not isinstance(value, bool) and _number(value) is None:
            raise ConfigError(f"{name} is {shown(value)}; it takes a text, true or false, or a finite number")


def _field_types(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _known(name: object, section: type, where: str) -> None:
    names = list(_field_types(section))
    if name not in names:
        near = difflib.get_close_matches(str(name)[:_NAME], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"{where} {shown(name)} is unknown; {hint}")


def _section(section: type, values: dict, where: str) -> Any:
    types, rules = _field_types(section), find_rules(section)
    converted = {}
    for name, value in values.items():
        _known(name, section, f"{where}:")
        if isinstance(value, str | bool):
            value = dict(rules[name].before).get(str(value).lower(), value)
        converted[name] = _convert(value, types[name], f"{where}.{name}")
    return section(**converted)


def _convert(value: object, kind: Any, where: str) -> Any:
    """`value` as the field's type. PyYAML reads 3e-4 as a string, so numbers are parsed here."""
    if kind is str and isinstance(value, str | None):
        return plain(str(value or ""), where)  # YAML reads `name:` with nothing behind it as null
    if isinstance(value, _Typed):
        value = _yaml_value(value, where)
    if kind is Duration:
        return _duration(value, where)
    if kind is Size:
        return to_size(value, where)
    if words := words_of(kind):
        if isinstance(value, str) and value in words:
            return value
        with contextlib.suppress(ConfigError):
            return _convert(value, float, where)
        raise ConfigError(f"{where} is {shown(value)}; it takes a number, or {' or '.join(words)}")
    if typing.get_origin(kind) is tuple:
        length = len(typing.get_args(kind))
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ConfigError(f"{where} is {shown(value)}; it takes a list of {length} numbers")
        return tuple(_convert(item, float, where) for item in value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value)
        if kind is float and number is not None:
            return float(number)
        if kind is int and number is not None and number == int(number):
            return int(number)
    names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    raise ConfigError(f"{where} is {shown(value)}; it takes {names[kind]}")


def words_of(kind: Any) -> tuple[str, ...]:
    """The words that a setting of type `float | Literal[…]` takes beside numbers; () for every other type."""
    return tuple(word for part in typing.get_args(kind) for word in typing.get_args(part))


def _number(value: int | float | str) -> int | float | None:
    """A finite number, whole ones to the last digit; None for anything else, and for more digits than people write."""
    if len(value) > _DIGITS if isinstance(value, str) else isinstance(value, int) and value.bit_length() > 4 * _DIGITS:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(value) if isinstance(value, str) else value
            return number if math.isfinite(number) else None
    return None


def _duration(value: object, where: str) -> Duration:
    words = value.split() if isinstance(value, str) else []
    if isinstance(value, Duration):
        return value
    if len(words) == 2 and words[1].rstrip("s") + "s" in UNITS:
        count = _convert(words[0], float, where)
        if count >= 0:
            return Duration(count, words[1].rstrip("s") + "s")
    raise ConfigError(f"{where} is {shown(value)}; write a number and a unit, such as 300 epochs or 10000 steps")


def to_size(value: object, where: str) -> Size:
    """224, "224" or "224x288" as a Size. Raises ConfigError for anything else."""
    typed = isinstance(value, int | str) and not isinstance(value, bool)
    sides = (value if isinstance(value, str) else shown(value)).split("x") if typed else []
    if isinstance(value, Size):
        return value
    if len(sides) in (1, 2) and all(_SIDE.fullmatch(side) for side in sides):
        return Size(int(sides[0]), int(sides[-1]))
    raise ConfigError(f"{where} is {shown(value)}; write pixels, such as 224, or height and width, such as 224x288")


def to_dict(config: Config) -> dict:
    """Nested plain values, as YAML and JSON write them; from_dict reads them back."""

    def written(value: object) -> object:
        if isinstance(value, Duration):
            return str(value)
        if isinstance(value, Size):
            return value.height if value.height == value.width else str(value)
        if isinstance(value, tuple):
            return list(value)
        return value

    return {
        section: values
        if section == "deepspeed"
        else {name: written(getattr(getattr(config, section), name)) for name in values}
        for section, values in dataclasses.asdict(config).items()
    }


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text."""
    return write_yaml(to_dict(config))
