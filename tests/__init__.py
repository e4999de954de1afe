"""The tests, and how their processes find packages: `beitforge` in src/; of the checkout's top folders only `tests` and
`benchmarks`. `python -m pytest` puts the top on the path, where `kernels` would hide an installed package of that name.
"""

import contextlib
import os
import signal
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

_ROOT = str(Path(__file__).resolve().parents[1])
_SOURCES = os.path.join(_ROOT, "src")


class _Top(FileFinder):
    """Of the checkout's top folders only `tests` and `benchmarks` are modules."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return super().find_spec(fullname, target) if fullname in ("tests", "benchmarks") else None


def _top(entry: str) -> _Top:
    if os.path.realpath(entry) != _ROOT:
        raise ImportError(entry)
    return _Top(entry, (SourceFileLoader, SOURCE_SUFFIXES))


sys.path_hooks.insert(0, _top)
sys.path_importer_cache.clear()
if _ROOT not in sys.path:
    sys.path.append(_ROOT)
if _SOURCES not in sys.path:
    sys.path.insert(0, _SOURCES)
if _SOURCES not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # for processes that tests start
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_SOURCES, os.environ.get("PYTHONPATH", ""))))
os.environ.pop("BEITFORGE_COMMAND", None)  # launch.sh's: messages are the same however the tests are started
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would ignore Ctrl-C, too
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
