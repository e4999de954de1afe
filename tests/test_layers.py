"""Who may know what (DESIGN §5): imports run down only. One table, held against the imports of every file.

Imports inside functions count like any other. `may` names modules of this project exactly or packages by prefix
("shards" allows all of it); outside it, whole libraries; the standard library is free to all. `never` holds for what is
reached through others, too.
"""

import ast
import functools
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "shards", "pipeline")

CONFIG = "pipeline.config pipeline.settings pipeline.rules"
ENGINE = f"{CONFIG} pipeline.engine"
LEARN = f"{CONFIG} kernels torch numpy pipeline.pixels"
REPORT = f"{CONFIG} pipeline.chart pipeline.lines pipeline.look pipeline.page pipeline.record pipeline.saved"
REPORT += " pipeline.words"
# shards without its two modules that use torch, and what a stage may use
TORCHLESS = "shards.cache shards.codec shards.draws shards.errors shards.files shards.manifest shards.progress"
TORCHLESS += " shards.remote shards.tokens"
BELOW = "torch numpy shards pipeline.checkpoint pipeline.metrics pipeline.model pipeline.objective pipeline.optim"
BELOW += " pipeline.page pipeline.photos pipeline.pictures pipeline.pixels pipeline.probe pipeline.provenance"
BELOW += " pipeline.record pipeline.sections pipeline.signals pipeline.streams pipeline.tokenizer pipeline.training"
BELOW += " pipeline.loop pipeline.weights pipeline.dvae pipeline.precision pipeline.peers pipeline.resize"
PLAN = f"{CONFIG} pipeline.assumptions pipeline.costs pipeline.failures pipeline.forecast pipeline.machines"
PLAN += " pipeline.sharding pipeline.timeline"
UNPLANNED = "torch deepspeed shards.loader pipeline.stages"
BELOW += " pipeline.labelled"
BELOW += " pipeline.comparison pipeline.document pipeline.encoders pipeline.gallery pipeline.words pipeline.evaluation"
BELOW += " pipeline.ending pipeline.rendezvous pipeline.formats pipeline.foreign safetensors kernels"


@dataclass(frozen=True)
class Row:
    """The first row whose pattern fits a module is its row."""

    who: str
    may: str
    never: str = ""


TABLE = (
    Row("kernels*", "kernels torch triton", "shards pipeline deepspeed"),
    Row("shards.codec", "shards numpy PIL", "kernels pipeline deepspeed torch"),
    Row("shards.jpeg", "shards.errors numpy PIL nvidia simplejpeg", "kernels pipeline deepspeed torch"),
    Row("shards.remote", "shards xxhash fsspec aiohttp", "kernels pipeline deepspeed torch"),
    Row("shards.loader", "shards numpy torch", "kernels pipeline deepspeed"),
    Row("shards.cuts", "shards numpy torch", "kernels pipeline deepspeed"),
    Row("shards*", "shards numpy webdataset yaml safetensors xxhash tqdm", "kernels pipeline deepspeed torch"),
    Row("pipeline", ""),
    Row(
        "pipeline.__main__",
        f"pipeline.commandline {CONFIG} pipeline.rendezvous pipeline.signals pipeline.stages shards.errors "
        "pipeline.findings pipeline.checks_host pipeline.checks_ssh",
    ),
    Row("pipeline.settings", "", "torch numpy shards kernels"),
    Row("pipeline.commandline", "", "torch numpy shards kernels"),
    Row("pipeline.rules", "pipeline.settings", "torch numpy shards kernels"),
    Row("pipeline.config", "yaml pipeline.settings pipeline.rules", "torch numpy shards kernels"),
    Row("pipeline.rendezvous", CONFIG, "torch numpy shards"),
    Row("pipeline.signals", "pipeline.rendezvous", "torch numpy shards"),
    Row("pipeline.carried", f"{CONFIG} pipeline.signals", "torch numpy shards"),
    Row("pipeline.findings", "", "torch numpy shards pipeline.config"),
    Row("pipeline.checks_host", f"{CONFIG} pipeline.findings pipeline.rendezvous", "torch numpy shards"),
    Row("pipeline.checks_ssh", "pipeline.findings pipeline.checks_host", "torch numpy shards"),
    Row(
        "pipeline.checks_data",
        f"{CONFIG} pipeline.findings pipeline.labelled pipeline.rendezvous pipeline.streams shards",
        "pipeline.model pipeline.stages deepspeed",
    ),
    Row(
        "pipeline.checks_device",
        f"{ENGINE} pipeline.findings pipeline.forecast pipeline.sharding pipeline.checks_host pipeline.metrics "
        "pipeline.model pipeline.objective "
        "pipeline.optim pipeline.rendezvous pipeline.streams kernels shards.loader torch numpy",
        "pipeline.stages",
    ),
    Row("pipeline.checks_network", f"{ENGINE} pipeline.findings torch", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.gathering",
        "pipeline.findings pipeline.rendezvous torch",
        "pipeline.model shards pipeline.stages deepspeed",
    ),
    Row("pipeline.blocks", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.model", f"{LEARN} pipeline.blocks", "shards deepspeed pipeline.stages"),
    Row(
        "pipeline.augment",
        f"{CONFIG} numpy scipy torch PIL timm shards.draws pipeline.stand_in",
        "shards.loader deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.masking", LEARN, "shards deepspeed pipeline.stages torch"),
    Row("pipeline.objective", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.optim", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.pixels", "torch kernels", "shards deepspeed pipeline.stages"),
    Row("pipeline.dvae", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.dalle", LEARN, "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.vqkd", f"{LEARN} pipeline.blocks", "shards deepspeed pipeline.stages pipeline.model"),
    Row(
        "pipeline.tokenizer",
        f"{LEARN} safetensors pipeline.dvae pipeline.dalle pipeline.vqkd",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row(
        "pipeline.foreign",
        f"{CONFIG} torch safetensors pipeline.dalle pipeline.vqkd",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.stand_in", "torchvision", "shards deepspeed pipeline.stages pipeline.model torch"),
    Row("pipeline.formats", f"{CONFIG} torch", "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.resize", f"{CONFIG} torch scipy", "shards deepspeed pipeline.stages pipeline.model"),
    Row(
        "pipeline.peers",
        f"{CONFIG} torch safetensors pipeline.formats pipeline.stand_in transformers timm",
        "shards deepspeed pipeline.stages pipeline.model",
    ),
    Row("pipeline.precision", "torch pipeline.tokenizer", "shards deepspeed pipeline.stages pipeline.model"),
    Row("pipeline.probe", "torch", "shards deepspeed pipeline"),
    Row(
        "pipeline.engine",
        f"{CONFIG} torch deepspeed pipeline.rendezvous pipeline.sharding pipeline.watchdog pipeline.writer",
        "pipeline.model shards pipeline.stages",
    ),
    Row("pipeline.lines", "", "torch numpy shards"),
    Row("pipeline.saved", "", "torch numpy shards"),
    Row(
        "pipeline.metrics",
        f"{CONFIG} torch wandb pipeline.lines pipeline.run",
        "pipeline.model shards pipeline.stages deepspeed",
    ),
    Row("pipeline.run", f"{CONFIG} yaml", "pipeline.model shards pipeline.stages torch deepspeed"),
    Row("pipeline.writer", "torch deepspeed", "pipeline shards"),
    Row("pipeline.zero", f"{ENGINE} torch deepspeed", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.checkpoint",
        f"{ENGINE} torch pipeline.metrics pipeline.saved pipeline.zero",
        "pipeline.model shards pipeline.stages",
    ),
    Row("pipeline.guard", f"{CONFIG} pipeline.run", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.watchdog", "", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.positions", "pipeline.run", "torch pipeline.model shards pipeline.stages"),
    Row("pipeline.pace", f"{CONFIG} torch", "pipeline.model shards pipeline.stages deepspeed"),
    Row(
        "pipeline.loop",
        f"{ENGINE} torch pipeline.feed pipeline.guard pipeline.metrics pipeline.pace pipeline.positions pipeline.run",
        "pipeline.model shards pipeline.stages",
    ),
    Row("pipeline.ending", f"{ENGINE} pipeline.checkpoint pipeline.signals", "pipeline.model shards pipeline.stages"),
    Row("pipeline.feed", f"{CONFIG} torch pipeline.pace", "pipeline.model shards pipeline.stages"),
    Row(
        "pipeline.streams",
        f"{CONFIG} pipeline.masking pipeline.rendezvous pipeline.tokenizer shards numpy torch",
        "pipeline.model deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.labelled",
        f"{CONFIG} pipeline.augment pipeline.streams shards numpy",
        "pipeline.model deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.training",
        f"{ENGINE} pipeline.checkpoint pipeline.guard pipeline.loop pipeline.metrics pipeline.optim pipeline.pace "
        "pipeline.positions pipeline.run pipeline.streams pipeline.watchdog shards torch",
        "pipeline.model pipeline.stages",
    ),
    Row(
        "pipeline.weights",
        f"{ENGINE} pipeline.checkpoint pipeline.metrics pipeline.model pipeline.resize pipeline.zero torch safetensors",
        "shards pipeline.stages",
    ),
    Row(
        "pipeline.survey",
        f"{ENGINE} torch pipeline.blocks pipeline.model pipeline.objective pipeline.probe pipeline.streams "
        "pipeline.tokenizer shards.loader",
        "pipeline.stages",
    ),
    Row(
        "pipeline.evaluation",
        f"{ENGINE} torch pipeline.objective pipeline.labelled pipeline.precision pipeline.streams pipeline.survey "
        "pipeline.tokenizer shards",
        "pipeline.stages",
    ),
    Row("pipeline.photos", f"{CONFIG} numpy {TORCHLESS}", "torch deepspeed pipeline.stages"),
    Row("pipeline.words", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.chart", "pipeline.words numpy", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.look", "", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.script", "", "torch numpy shards pipeline.stages"),
    Row("pipeline.page", f"{REPORT} pipeline.script", "torch deepspeed shards pipeline.stages"),
    Row("pipeline.record", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.sections", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.provenance", f"{REPORT} numpy {TORCHLESS}", "torch pipeline.model pipeline.stages"),
    Row(
        "pipeline.pictures",
        f"{LEARN} pipeline.model pipeline.objective pipeline.streams pipeline.tokenizer shards",
        "deepspeed pipeline.stages",
    ),
    Row("pipeline.curves", REPORT, "pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.comparison", f"{REPORT} pipeline.sections", "pipeline.model pipeline.stages deepspeed"),
    Row("pipeline.document", f"{REPORT} pipeline.curves pipeline.sections", "pipeline.model pipeline.stages"),
    Row(
        "pipeline.attention_maps",
        f"{LEARN} pipeline.blocks pipeline.model pipeline.pictures",
        "deepspeed pipeline.stages",
    ),
    Row(
        "pipeline.neighbours",
        f"{LEARN} pipeline.attention_maps pipeline.model pipeline.pictures pipeline.probe shards.loader",
        "deepspeed pipeline.stages",
    ),
    Row("pipeline.encoders", f"{CONFIG} torch pipeline.model pipeline.weights", "shards pipeline.stages"),
    Row(
        "pipeline.gallery",
        f"{REPORT} numpy torch pipeline.attention_maps pipeline.encoders pipeline.model pipeline.neighbours "
        "pipeline.objective pipeline.pictures pipeline.precision pipeline.streams pipeline.tokenizer "
        "pipeline.checkpoint shards",
        "pipeline.stages",
    ),
    Row(
        "pipeline.following",
        f"{CONFIG} pipeline.lines pipeline.saved pipeline.signals pipeline.words",
        "torch numpy shards",
    ),
    Row("pipeline.live", "", "torch numpy shards"),
    Row("pipeline.live_look", "", "torch numpy shards"),
    Row("pipeline.serving", CONFIG, "torch numpy shards"),
    Row("pipeline.beside", "", "torch numpy shards"),
    Row(
        "pipeline.terminal",
        f"{CONFIG} pipeline.following pipeline.lines pipeline.record pipeline.words",
        "torch deepspeed pipeline.model pipeline.stages",
    ),
    Row(
        "pipeline.picturing",
        f"{REPORT} pipeline.beside pipeline.gallery pipeline.signals torch",
        "pipeline.stages",
    ),
    Row("pipeline.machines", "", UNPLANNED),
    Row("pipeline.costs", CONFIG, UNPLANNED),
    Row("pipeline.assumptions", CONFIG, UNPLANNED),
    Row("pipeline.sharding", PLAN, UNPLANNED),
    Row("pipeline.failures", "numpy shards.draws", UNPLANNED),
    Row("pipeline.timeline", "numpy pipeline.failures shards.draws", UNPLANNED),
    Row("pipeline.forecast", PLAN, UNPLANNED),
    Row("pipeline.planned", PLAN, UNPLANNED),
    Row("pipeline.stages", ""),
    Row("pipeline.stages.launch", f"{CONFIG} pipeline.carried pipeline.signals", "torch numpy shards"),
    Row("pipeline.stages.slurm", f"{CONFIG} pipeline.signals shards.__main__ shards.files"),
    Row(
        "pipeline.stages.plan",
        f"{PLAN} pipeline.planned shards.errors shards.manifest",
        "torch deepspeed shards.loader",
    ),
    Row(
        "pipeline.stages.watch",
        f"{REPORT} pipeline.beside pipeline.document pipeline.following pipeline.live pipeline.live_look "
        "pipeline.provenance pipeline.script pipeline.serving pipeline.terminal pipeline.words",
        "torch deepspeed pipeline.model",
    ),
    Row("pipeline.stages.stop", f"{CONFIG} pipeline.signals", "torch numpy shards"),
    Row(
        "pipeline.stages.doctor",
        f"{ENGINE} {BELOW} pipeline.findings pipeline.gathering pipeline.forecast pipeline.sharding "
        "pipeline.checks_data pipeline.checks_device pipeline.checks_host pipeline.checks_network",
    ),
    Row("pipeline.stages.*", f"{ENGINE} {BELOW}"),
)


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
    ("kernels/attention/sdpa.py", "import pipeline.config", "imports pipeline.config"),
    ("kernels/attention/reference.py", "from shards import draws", "imports shards.draws"),
    ("shards/order.py", "import torch", "imports torch"),
    ("shards/pack.py", "def late():\n    from PIL import Image", "imports PIL"),
    ("shards/stats.py", "from shards.loader import Batch", "must never know torch"),
    ("shards/codec.py", "import pipeline.config", "imports pipeline.config"),
    ("shards/loader.py", "from kernels.attention import attention", "imports kernels.attention"),
    ("pipeline/config.py", "def late():\n    import numpy as np", "imports numpy"),
    ("pipeline/settings.py", "import yaml", "imports yaml"),
    ("pipeline/config.py", "from pipeline.metrics import say", "must never know torch"),
    ("pipeline/model.py", "if False:\n    from shards import draws", "imports shards.draws"),
    ("pipeline/masking.py", "from shards.draws import bits", "imports shards.draws"),
    ("pipeline/objective.py", "from . import model", "imports pipeline.model"),
    ("pipeline/optim.py", "from .streams import Source", "imports pipeline.streams"),
    ("pipeline/engine.py", "from pipeline.model import Beit", "imports pipeline.model"),
    ("pipeline/loop.py", "import deepspeed", "imports deepspeed"),
    ("pipeline/loop.py", "from pipeline import training", "must never know shards"),
    ("pipeline/checkpoint.py", "import importlib\nimportlib.import_module('shards.images')", "imports shards.images"),
    ("pipeline/photos.py", "from shards import loader", "imports shards.loader"),
    ("pipeline/page.py", "import torch", "imports torch"),
    ("pipeline/training.py", "from pipeline.weights import load_encoder", "must never know pipeline.model"),
    ("pipeline/stages/export.py", "from pipeline.stages import probe", "imports pipeline.stages.probe"),
    ("pipeline/stages/report.py", "from . import tokenize", "imports pipeline.stages.tokenize"),
    ("pipeline/stages/demo.py", "import pipeline.stages.export", "imports pipeline.stages.export"),
    ("pipeline/stages/pretrain.py", "import deepspeed", "imports deepspeed"),
    ("pipeline/stages/pretrain.py", "import transformers", "imports transformers"),
    ("pipeline/forecast.py", "from pipeline.model import training_flops", "must never know torch"),
    ("pipeline/stages/plan.py", "from shards import loader", "must never know torch"),
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
