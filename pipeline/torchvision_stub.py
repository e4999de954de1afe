"""A stand-in for torchvision where none loads, so that timm's BEiT does: in exports and in tests.

torchvision's wheel on the package index is built for a CUDA torch and does not load without one. timm and transformers
import it for transforms and detection operators, none of which their BEiT uses: here every torchvision name is an empty
class.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# what importing a library that was built for another torch, or is half installed, ends in
DOES_NOT_LOAD = (ImportError, RuntimeError, OSError, AttributeError, TypeError, ValueError, NameError)


class _Module(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__, "BICUBIC": 3, "BILINEAR": 2, "NEAREST": 0})
        for member in ("HAMMING", "BOX", "LANCZOS", "NEAREST_EXACT"):
            setattr(made, member, member)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__version__ = "0"


def install() -> None:
    """Put the stand-in in place, unless a torchvision that loads is there."""
    try:
        import torchvision.ops  # noqa: F401
    except DOES_NOT_LOAD:
        for name in [name for name in list(sys.modules) if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
