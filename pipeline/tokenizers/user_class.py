"""Tokenizer kinds whose class is outside this package: `module:Class` in tokenizer.json (docs/python.md).

The class is a torch module that is built from keyword arguments, its shape, and does what VisualTokenizer says. A
tokenizer folder may come from anywhere, so that the name in it imports nothing unless the user has named it, too.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from beitforge.pipeline.errors import ConfigError

# in the environment: the classes that a tokenizer folder may name, with commas between
TRUSTED = "BEITFORGE_TOKENIZER_CLASSES"


def build(kind: str, shape: dict) -> nn.Module:
    """The tokenizer of a kind `module:Class` and a shape. Raises ConfigError when there is no such class."""
    return _user_class(kind)(**shape)


def user_kind(module: nn.Module, shape: dict) -> str:
    """The kind, `module:Class`, of a tokenizer whose class is outside this package.

    shape: what the class is built from. Raises ConfigError when `build` could not make this module of the two.
    """
    kind = f"{type(module).__module__}:{type(module).__qualname__}"
    if type(module).__module__ == "__main__" or "." in type(module).__qualname__:
        raise ConfigError(f"{kind} cannot be imported elsewhere: define the class at the top of a module file")
    missing = [part for part in ("tokenize", "decode", "decodes", "stride") if not hasattr(module, part)]
    if missing:
        raise ConfigError(f"{kind} lacks {', '.join(missing)}: docs/python.md says what a tokenizer has")
    if not isinstance(shape.get("vocabulary"), int):
        raise ConfigError(f"the shape of {kind} is {shape}; it must hold vocabulary, the number of different tokens")
    again = {name: tensor.shape for name, tensor in build(kind, shape).state_dict().items()}
    if again != {name: tensor.shape for name, tensor in module.state_dict().items()}:
        raise ConfigError(f"{kind} built from {shape} has other weights than the module that is to be saved")
    return kind


def _user_class(kind: str) -> Callable[..., Any]:
    """The class that a kind names: of a module that is imported already, or that the user has named in TRUSTED. Nothing
    but a torch module that tokenizes is ever called."""
    where, _, name = kind.partition(":")
    if where not in sys.modules and kind not in [word.strip() for word in os.environ.get(TRUSTED, "").split(",")]:
        raise ConfigError(
            f"the tokenizer's class is {kind}, code outside beitforge that would run: if you trust it, set "
            f"{TRUSTED}={kind}"
        )
    try:
        found = getattr(importlib.import_module(where), name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the tokenizer's class {kind} is not found (no module named {error.name!r}): install its package, or add "
            f"its folder to PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "tokenize")):
        raise ConfigError(f"the tokenizer's class {kind} is not a torch.nn.Module with a method `tokenize`")
    return found
