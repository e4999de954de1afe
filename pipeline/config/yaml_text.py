"""YAML as people write it, read within bounds: nothing of it may take long, much memory, or run anything.

Plain scalars are what YAML 1.2 makes of them, so that `1:30` and `2024-01-01` are texts and not numbers to the base of
60 and dates; `yes`, `no`, `on` and `off` stay true and false. Must not know any setting.
"""

from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 128 * 1024  # characters of a file
_DEPTH = 32  # of nested lists and mappings
_NODES = 5_000  # values, keys and lists, each as often as aliases repeat it
_DIGITS = 40  # of a whole number; a longer one is a text
_SAID = 300  # characters of a complaint
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def read_yaml(text: str) -> Any:
    """What a YAML text holds: None, bool, int, float, str, list and dict. Raises ValueError with one line."""
    if len(text) > LARGEST:
        raise ValueError(f"it has {len(text):,} characters, more than the {LARGEST:,} of any config")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        said = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        raise ValueError(said if len(said) <= _SAID else f"{said[:_SAID]}…") from error


def write_yaml(content: dict) -> str:
    """As text, in the order of its keys; `read_yaml` gives the same again."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class _Refused(yaml.MarkedYAMLError):
    """What is valid YAML and no config."""

    def __init__(self, problem: str, mark: Any):
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """A SafeLoader within bounds, which refuses a key given twice, where SafeLoader silently takes the last."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}  # nodes in a node, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if self._depth == _DEPTH:
            raise _Refused(f"it nests more than {_DEPTH} levels deep", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!", _TEXT):
            raise _Refused(f"the tag {event.tag} is none of a config's", event.start_mark)
        self._count += 1
        if self._count > _NODES:
            raise _Refused(f"it has more than {_NODES:,} values", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _Refused(f"*{event.anchor} stands inside of what it names", event.start_mark)
        elif node is not None:
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            parts = [] if isinstance(node, yaml.ScalarNode) else parts
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
            if self._sizes[id(node)] > _NODES:
                raise _Refused(f"it has more than {_NODES:,} values, aliases followed", event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _Refused(f"{key!r} is given twice", key_node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int | str:
        """Decimal, or 0x and 0b; a text where YAML 1.1 would take the base 8 or 60."""
        digits = node.value.lstrip("+-").replace("_", "")
        if len(digits) > _DIGITS or ":" in digits or (digits[:1] == "0" and digits.isdecimal() and len(digits) > 1):
            return str(node.value)
        try:
            return int(super().construct_yaml_int(node))
        except (ValueError, IndexError):  # 0x_
            return str(node.value)

    def number(self, node: yaml.ScalarNode) -> float | str:
        """A text where YAML 1.1 would take the base 60."""
        return str(node.value) if ":" in node.value else float(super().construct_yaml_float(node))


def _as_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _as_text)
_Loader.add_constructor("tag:yaml.org,2002:value", _as_text)
