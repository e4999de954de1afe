"""The shape of the tree: which folder may import what (folder_rules.py), no cycle, no folder that grows too large.

Imports inside functions count like any other. The standard library is free to all.
"""

import ast
import functools
import shutil
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.folder_rules import PIPELINE_ROOT, SHARDS_ROOT, TABLE, Row

PACKAGES = ("kernels", "shards", "pipeline")
OPERATORS = ("kernels/attention", "kernels/cross_entropy", "kernels/pixels")  # a folder is its public function
LARGEST_FOLDER = 12
MOST_ROWS = 30
_OWN = tuple(f"beitforge.{package}" for package in PACKAGES)
Graph = dict[str, list[tuple[int, str]]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(root: Path) -> dict[str, Path]:
    """Every module of the three packages, by name without `beitforge.`."""
    return {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}


@functools.cache
def imports(package: str, text: str, known: frozenset[str]) -> list[tuple[int, str]]:
    """Line and module of everything a file of `package` imports, wherever in it."""
    found: list[tuple[int, str]] = []

    def add(line: int, module: str, *names: str) -> None:
        base = module.removeprefix("beitforge.") if module.startswith(_OWN) else module
        inner = [f"{base}.{name}" for name in names] or [base]
        found.extend((line, module if module in known else base) for module in inner)

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            add(node.lineno, module, *(alias.name for alias in node.names))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                add(node.lineno, str(node.args[0].value))
    return found


def import_graph(root: Path) -> Graph:
    files = python_files(root)
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = imports(package, path.read_text(encoding="utf-8"), frozenset(files))
    return graph


def folder_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def covers(allowed: str, module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed.split())


def row_of(name: str) -> Row | None:
    return next((row for row in TABLE if any(fnmatchcase(name, pattern) for pattern in row.who.split())), None)


def allowed(row: Row, name: str, folder: str) -> str:
    """Everything that a module may import."""
    own = "" if row.alone else folder if folder not in PACKAGES else ""
    root = {"shards": SHARDS_ROOT, "pipeline": PIPELINE_ROOT, "kernels": "kernels"}[name.partition(".")[0]]
    return f"{own} {root} {row.may}"


def reached(name: str, graph: Graph) -> dict[str, list[str]]:
    """Every module that importing `name` may bring in, with the way there."""
    ways: dict[str, list[str]] = {}
    todo = [[name]]
    while todo:
        way = todo.pop()
        for _, module in graph.get(way[-1], []):
            if module not in ways:
                ways[module] = [*way, module]
                todo.append(ways[module])
    return ways


def violations(root: Path, who: str = "*") -> list[str]:
    """Lines for whatever in `root` the table does not allow."""
    files, graph = python_files(root), import_graph(root)
    lines: list[str] = []
    for name, path in files.items():
        if not fnmatchcase(name, who):
            continue
        row, where, folder = row_of(name), path.relative_to(root).as_posix(), folder_of(name, path)
        if row is None:
            lines.append(f"{where} has no row in tests/folder_rules.py: say what it may import")
            continue
        for line, module in graph[name]:
            free = module.partition(".")[0] in sys.stdlib_module_names
            sibling = row.alone and module != folder and module.startswith(f"{folder}.")
            if not free and (sibling or not covers(allowed(row, name, folder), module)):
                lines.append(f"{where}:{line} imports {module}; {row.who} may import: {row.may}")
        for module, way in reached(name, graph).items():
            if covers(row.never, module):
                lines.append(f"{where} must never know {module}, and does: {' → '.join(way)}")
    return lines


def folder_cycle(root: Path) -> list[str]:
    """Folders that import each other in a circle; [] where there is none. A package's root modules count singly."""
    files, graph = python_files(root), import_graph(root)
    place = {
        name: folder_of(name, path) if folder_of(name, path) not in PACKAGES else name for name, path in files.items()
    }
    ways: dict[str, set[str]] = {}
    for name, imported in graph.items():
        ways.setdefault(place[name], set()).update(
            place[m] for _, m in imported if m in place and place[m] != place[name]
        )
    while True:
        ends = {folder for folder, onward in ways.items() if not onward}
        if not ends:
            return sorted(ways)
        ways = {folder: onward - ends for folder, onward in ways.items() if folder not in ends}


@pytest.mark.parametrize("name", python_files(ROOT))
def test_imports_run_down_only(name):
    assert violations(ROOT, name) == []


def test_there_is_no_cycle():
    assert folder_cycle(ROOT) == []


def test_the_table_is_short_and_every_row_is_about_something():
    """A row of a folder that is gone is deleted with it."""
    assert len(TABLE) <= MOST_ROWS
    used = {row.who for name in python_files(ROOT) if (row := row_of(name))}
    assert used == {row.who for row in TABLE}


def test_no_folder_is_too_large():
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path in python_files(ROOT).values())
    del sizes["pipeline/commands"], sizes["pipeline/stages"]  # one verb, one file
    assert {folder: size - 1 for folder, size in sizes.items() if size - 1 > LARGEST_FOLDER} == {}


def test_each_folder_says_what_is_there_and_imports_nothing():
    for path in python_files(ROOT).values():
        if path.name == "__init__.py" and path.parent.relative_to(ROOT).as_posix() not in OPERATORS:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert len(tree.body) == 1 and ast.get_docstring(tree), path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the three packages to plant things in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


PLANTED = [
    ("kernels/attention/sdpa.py", "import beitforge.pipeline.config.loading", "imports pipeline.config.loading"),
    ("kernels/attention/reference.py", "from beitforge.shards import counter_rng", "imports shards.counter_rng"),
    ("shards/stream/order.py", "import torch", "imports torch"),
    ("shards/pack/pack.py", "def late():\n    from PIL import Image", "imports PIL"),
    ("shards/inspect/stats.py", "from beitforge.shards.stream.loader import Batch", "must never know torch"),
    ("shards/decode/codec.py", "import beitforge.pipeline.errors", "imports pipeline.errors"),
    ("shards/format/index.py", "from beitforge.shards.decode import codec", "imports shards.decode.codec"),
    ("shards/stream/loader.py", "from beitforge.kernels.attention import attention", "imports kernels.attention"),
    ("pipeline/config/loading.py", "def late():\n    import numpy as np", "imports numpy"),
    ("pipeline/config/settings.py", "from beitforge.pipeline.runs import folder", "imports pipeline.runs.folder"),
    ("pipeline/cluster/signals.py", "import torch", "imports torch"),
    ("pipeline/runs/record.py", "from beitforge.pipeline.training.metrics import Metrics", "must never know torch"),
    ("pipeline/model/beit.py", "if False:\n    from beitforge.shards import counter_rng", "imports shards.counter_rng"),
    ("pipeline/model/masking.py", "from beitforge.pipeline.model import blocks", "must never know torch"),
    ("pipeline/training/objectives.py", "from ..model import beit", "must never know pipeline.model.beit"),
    ("pipeline/training/optim.py", "from ..evaluation.probe import probe", "imports pipeline.evaluation.probe"),
    ("pipeline/distributed/engine.py", "from beitforge.pipeline.model.beit import Beit", "imports pipeline.model.beit"),
    ("pipeline/training/loop.py", "import deepspeed", "imports deepspeed"),
    (
        "pipeline/checkpoints/saver.py",
        "import importlib\nimportlib.import_module('beitforge.shards.stream.image_set')",
        "imports shards.stream.image_set",
    ),
    ("pipeline/reports/components.py", "import torch", "imports torch"),
    ("pipeline/reports/summary.py", "from beitforge.pipeline.reports import gallery", "must never know torch"),
    ("pipeline/watch/terminal.py", "from beitforge.pipeline.reports import gallery", "must never know torch"),
    ("pipeline/plan/estimate.py", "from beitforge.pipeline.model.beit import Beit", "must never know torch"),
    ("pipeline/stages/export.py", "from beitforge.pipeline.stages import probe", "imports pipeline.stages.probe"),
    ("pipeline/commands/report.py", "from . import tokenize", "imports pipeline.commands.tokenize"),
    ("pipeline/commands/demo.py", "import torch", "imports torch"),
    ("pipeline/stages/pretrain.py", "import deepspeed", "imports deepspeed"),
    ("pipeline/stages/pretrain.py", "import transformers", "imports transformers"),
    ("shards/extra/thing.py", "import PIL", "imports PIL"),
]


@pytest.mark.parametrize(("file", "code", "words"), PLANTED, ids=lambda value: value.split("\n")[0])
def test_a_planted_violation_is_caught(tree, file, code, words):
    """Each in its own copy: the lines that are new name the file and what it should not import."""
    before = violations(tree)
    path = tree / file
    path.parent.mkdir(exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{text}\n{code}\n", encoding="utf-8")
    caught = [line for line in violations(tree) if line not in before]
    assert any(line.startswith(file) and words in line for line in caught), caught


def test_a_planted_cycle_is_caught(tree):
    path = tree / "pipeline" / "runs" / "folder.py"
    path.write_text(
        path.read_text(encoding="utf-8") + "\nfrom beitforge.pipeline.reports import charts\n", encoding="utf-8"
    )
    assert {"pipeline.runs", "pipeline.reports"} <= set(folder_cycle(tree))
