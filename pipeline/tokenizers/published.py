"""What reading a publisher's tokenizer file has in common for all kinds; the files' layouts stand with each kind.

Must not know shards or deepspeed.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.tokenizers.safe_pickle import CURE, Weights

Names = Callable[[str], str]  # our name of a weight to its publisher's


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published tokenizer as it was read: the shape that `build` of its kind takes, our names of its weights, the
    size of the views it was trained on in pixels, and the filter (pipeline.config.settings.FILTERS) that resized them.
    assumed: what the file does not say and no weight shows, in words."""

    shape: dict
    weights: dict[str, Tensor]
    input_size: Size
    resample: str
    assumed: str = ""


def count(there: Callable[[int], bool]) -> int:
    """The number of consecutive indices from 0 that exist; at least 1, so that the missing weights are reported."""
    return next(number for number in itertools.count(1) if not there(number))


def sizes(path: Path, weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one weight. Raises ConfigError if it is missing or has another number of dimensions."""
    found = tuple(weights[name].shape) if name in weights else ()
    if len(found) != dimensions or min(found) < 1:
        held = f"is of shape {list(found)}" if name in weights else "is missing"
        raise ConfigError(f"{path}: {name} {held}, expected {dimensions} dimensions: {CURE}")
    return found


def our_weights(path: Path, module: nn.Module, weights: Weights, theirs: Names, prefix: str) -> Weights:
    """The weights under our names, each preceded by `prefix`.

    Raises ConfigError unless they are exactly those of `module`, of the same shapes and finite.
    """
    expected = {theirs(name): (f"{prefix}{name}", list(tensor.shape)) for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() - weights.keys()):
        raise ConfigError(f"{path} lacks the weight {name!r} of such a tokenizer: {CURE}")
    for name in sorted(weights.keys() - expected.keys()):
        raise ConfigError(f"{path} has a weight {name[:100]!r} that such a tokenizer does not have: {CURE}")
    for name, (_, size) in expected.items():
        if list(weights[name].shape) != size:
            raise ConfigError(f"{path}: {name} is of shape {list(weights[name].shape)}, expected {size}: {CURE}")
        if not weights[name].isfinite().all():
            raise ConfigError(f"{path}: {name} contains non-finite numbers: {CURE}")
    return {ours: weights[name] for name, (ours, _) in expected.items()}
