"""What a library's words state, one by one: read as what they must be, and held against the weights.

Each raises ConfigError with the source, the word and its value. Must not know shards or any stage.
"""

import math
from typing import Any, NoReturn

from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.plain_text import shown
from beitforge.pipeline.weights.sources import CURE, Saved, Weights


def refuse(saved: Saved, what: str) -> NoReturn:
    """Raise ConfigError for a checkpoint that cannot be taken."""
    raise ConfigError(f"{saved.source}: {what}")


def sizes(saved: Saved, weights: Weights) -> tuple[int, int, int]:
    """Width, hidden width of the MLP, and layers. Raises ConfigError where these are no weights of a BEiT."""
    needed = ("patch_embedding.weight", "blocks.0.fc1.weight", "blocks.0.attention.qkv_weight")
    if any(name not in weights or weights[name].dim() != 2 for name in needed):
        raise ConfigError(f"{saved.source}: these weights have no blocks or no positions of a BEiT: {CURE}")
    layers = sum(name.endswith("attention.qkv_weight") for name in weights)
    return len(weights["patch_embedding.weight"]), len(weights["blocks.0.fc1.weight"]), layers


def agree_positions(saved: Saved, said: dict, weights: Weights, absolute: str, own: str, shared: str) -> None:
    """Refuse words about the kind of positions that the weights contradict; said: under the names of its library."""
    held = (("position_embedding", absolute), ("blocks.0.attention.own_bias.table", own), ("shared_bias.table", shared))
    for name, key in held:
        if key in said and bool(said[key]) != (name in weights):
            refuse(
                saved, f"{key} is {shown(said[key])}, which its weights contradict: its library would compute others"
            )


def agree(saved: Saved, said: dict, key: str, found: int) -> None:
    """Refuse a number that the weights contradict."""
    if number(saved, said, key, found) != found:
        refuse(saved, f"{key} is {shown(said[key])}, its weights have {found}")


def number(saved: Saved, said: dict, key: str, default: float | None) -> Any:
    """A finite number, or the default where nothing is said."""
    value = said.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(saved, f"{key} is {shown(value)}, no number")
    return value


def whole(saved: Saved, said: dict, key: str, default: int | None) -> Any:
    """A whole number of at least 1, or the default."""
    value = number(saved, said, key, default)
    if value is not None and (not isinstance(value, int) or value < 1):
        refuse(saved, f"{key} is {shown(value)}; it must be a whole number, at least 1")
    return value


def three(saved: Saved, key: str, value: Any) -> list[float]:
    """Three numbers; one stands for each."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    if len(numbers) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        refuse(saved, f"{key} is {shown(value)}; it must be three numbers")
    return [float(v) for v in numbers]
