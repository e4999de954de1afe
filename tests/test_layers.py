"""Who may know what (DESIGN §5): imports run down only. layer_table.py, held against the imports of every file.

Imports inside functions count like any other. `may` names modules of this project exactly or packages by prefix
("shards" allows all of it); outside it, whole libraries; the standard library is free to all. `never` holds for what is
reached through others, too.
"""

import ast
import functools
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.folder_rules import TABLE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "shards", "pipeline")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(root: Path) -> dict[str, Path]:
    """Every module of the three packages, by name."""
    return {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}


@functools.cache
def imports(package: str, text: str, known: frozenset[str]) -> list[tuple[int, str]]:
    """Line and module of everything a file of `package` imports, wherever in it."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, module if module in known else base) for module in inner]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def covers(allowed: str, module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed.split())


def reached(name: str, graph: dict[str, list[tuple[int, str]]]) -> dict[str, list[str]]:
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
    files = python_files(root)
    graph: dict[str, list[tuple[int, str]]] = {}
    lines: list[str] = []
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = imports(package, path.read_text(encoding="utf-8"), frozenset(files))
    for name, path in files.items():
        if not fnmatchcase(name, who):
            continue
        row = next((row for row in TABLE if fnmatchcase(name, row.who)), None)
        where = path.relative_to(root).as_posix()
        if row is None:
            lines.append(f"{where} has no row in the table of tests/test_layers.py: say what it may import")
            continue
        for line, module in graph[name]:
            free = module.partition(".")[0] in sys.stdlib_module_names
            if not free and not covers(row.may, module):
                lines.append(f"{where}:{line} imports {module}; {row.who} may import: {row.may or 'nothing'}")
        for module, way in reached(name, graph).items():
            if covers(row.never, module):
                lines.append(f"{where} must never know {module}, and does: {' → '.join(way)}")
    return lines


@pytest.mark.parametrize("name", python_files(ROOT))
def test_imports_run_down_only(name):
    assert violations(ROOT, name) == []


def test_every_row_is_about_something():
    """A row of a file that is gone is deleted with it."""
    names = list(python_files(ROOT))
    used = {next(row.who for row in TABLE if fnmatchcase(name, row.who)) for name in names}
    assert used == {row.who for row in TABLE}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the three packages to plant things in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


PLANTED = [
    ("kernels/attention/sdpa.py", "import pipeline.config.loading", "imports pipeline.config.loading"),
    ("kernels/attention/reference.py", "from shards import draws", "imports shards.counter_rng"),
    ("shards/stream/order.py", "import torch", "imports torch"),
    ("shards/pack/pack.py", "def late():\n    from PIL import Image", "imports PIL"),
    ("shards/inspect/stats.py", "from shards.stream.loader import Batch", "must never know torch"),
    ("shards/decode/codec.py", "import pipeline.config.loading", "imports pipeline.config.loading"),
    ("shards/stream/loader.py", "from kernels.attention import attention", "imports kernels.attention"),
    ("pipeline/config/loading.py", "def late():\n    import numpy as np", "imports numpy"),
    ("pipeline/config/settings.py", "import yaml", "imports yaml"),
    ("pipeline/config/loading.py", "from pipeline.training.metrics import say", "must never know torch"),
    ("pipeline/model/beit.py", "if False:\n    from shards import draws", "imports shards.counter_rng"),
    ("pipeline/model/masking.py", "from shards.counter_rng import bits", "imports shards.counter_rng"),
    ("pipeline/training/objectives.py", "from . import model", "imports pipeline.model.beit"),
    ("pipeline/training/optim.py", "from .streams import Source", "imports pipeline.data.pretraining"),
    ("pipeline/distributed/engine.py", "from pipeline.model.beit import Beit", "imports pipeline.model.beit"),
    ("pipeline/training/loop.py", "import deepspeed", "imports deepspeed"),
    ("pipeline/training/loop.py", "from pipeline import training", "must never know shards"),
    (
        "pipeline/checkpoints/saver.py",
        "import importlib\nimportlib.import_module('shards.stream.image_set')",
        "imports shards.stream.image_set",
    ),
    ("pipeline/data/demo_images.py", "from shards import loader", "imports shards.stream.loader"),
    ("pipeline/reports/components.py", "import torch", "imports torch"),
    (
        "pipeline/training/trainer.py",
        "from pipeline.weights.encoder import load_encoder",
        "must never know pipeline.model.beit",
    ),
    ("pipeline/stages/export.py", "from pipeline.stages import probe", "imports pipeline.stages.probe"),
    ("pipeline/commands/report.py", "from . import tokenize", "imports pipeline.stages.tokenize"),
    ("pipeline/commands/demo.py", "import pipeline.stages.export", "imports pipeline.stages.export"),
    ("pipeline/stages/pretrain.py", "import deepspeed", "imports deepspeed"),
    ("pipeline/stages/pretrain.py", "import transformers", "imports transformers"),
    ("pipeline/plan/estimate.py", "from pipeline.model.beit import training_flops", "must never know torch"),
    ("pipeline/commands/plan.py", "from shards import loader", "must never know torch"),
    ("pipeline/helpers.py", "import os", "has no row in the table"),
]


@pytest.mark.parametrize(("file", "code", "words"), PLANTED, ids=lambda value: str(value).split("\n")[0])
def test_a_planted_violation_is_caught(tree, file, code, words):
    """Each in its own copy: the lines that are new name the file and what it should not import."""
    before = violations(tree)
    path = tree / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{text}\n{code}\n", encoding="utf-8")
    caught = [line for line in violations(tree) if line not in before]
    assert any(line.startswith(file) and words in line for line in caught), caught
