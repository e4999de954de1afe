"""A tokenizer kind, an encoder preset and a verb each cost one new file and at most one line, and then work.

The additions go into a copy of the package, so that what they cost is counted by comparing the copy with the original.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.plan.costs import num_parameters
from tests.conftest import ROOT, TinySet

KIND = '''"""A token is the mean colour of a field of 8 × 8 pixels, at four levels a channel."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.tokenizers.published import Published


class Colours(nn.Module):
    decodes, stride, fixed_size = True, 8, None

    def __init__(self, levels: int):
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels))

    def tokenize(self, pixels_BCHW: Tensor) -> Tensor:
        level_BChw = (F.avg_pool2d(pixels_BCHW, 8) * self.levels).long().clamp(max=self.levels - 1)
        red, green, blue = level_BChw.unbind(1)
        return ((red * self.levels + green) * self.levels + blue).flatten(1)

    def decode(self, tokens_BN: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = tokens_BN.view(len(tokens_BN), *grid)
        channels = (tokens // self.levels**2, tokens // self.levels % self.levels, tokens % self.levels)
        return F.interpolate((torch.stack(channels, dim=1) + 0.5) / self.levels, scale_factor=8.0)


def build(shape: dict) -> Colours:
    return Colours(shape["levels"])


def read_published(source: Path) -> Published | None:
    if source.suffix != ".colours":
        return None
    levels = int(source.read_text())
    shape = {"levels": levels, "vocabulary": levels**3}
    weights = {"levels": torch.tensor(levels)}
    return Published(shape=shape, weights=weights, input_size=Size(32, 32), resample="bicubic")
'''
VERB = '''"""`count SHARDS`: the number of images in a shard set."""

import argparse
import json
from pathlib import Path

HELP = "print the number of images in a shard set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder of a shard set")


def run(arguments: argparse.Namespace) -> int:
    manifest = json.loads((arguments.shards / "manifest.json").read_text())
    print(sum(shard["samples"] for shard in manifest["shards"]))
    return 0
'''
PRESET = """# beitforge pretrain beit_small.yaml
model: {layers: 12, width: 384, heads: 6}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with a copy of the package to which one of each is added."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src" / "beitforge", folder / "beitforge", ignore=shutil.ignore_patterns("__pycache__"))
    pipeline = folder / "beitforge" / "pipeline"
    (pipeline / "tokenizers" / "colours.py").write_text(KIND)
    insert(
        pipeline / "tokenizers" / "storage.py", "KINDS = {", '    "colours": "beitforge.pipeline.tokenizers.colours",'
    )
    (pipeline / "commands" / "count.py").write_text(VERB)
    insert(pipeline / "cli.py", "VERBS = {", '    "count": "count",')
    (folder / "beitforge" / "configs" / "beit_small.yaml").write_text(PRESET)
    return folder


def insert(path: Path, after: str, line: str) -> None:
    lines = path.read_text().split("\n")
    lines.insert(lines.index(after) + 1, line)
    path.write_text("\n".join(lines))


def beitforge(extended: Path, *words: str | Path) -> str:
    """Standard output of a command of the extended package."""
    environment = {**os.environ, "PYTHONPATH": str(extended), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "beitforge", *map(str, words)]
    done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_costs_one_file_and_at_most_one_line(extended):
    package = extended / "beitforge"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    original = {path: ROOT / "src" / "beitforge" / path for path in files}
    new = {str(path) for path in files if not original[path].exists()}
    assert new == {"pipeline/tokenizers/colours.py", "pipeline/commands/count.py", "configs/beit_small.yaml"}
    changed = {}
    for path in sorted(files):
        if str(path) not in new and (package / path).read_bytes() != original[path].read_bytes():
            before = original[path].read_text().split("\n")
            changed[str(path)] = len([line for line in (package / path).read_text().split("\n") if line not in before])
    assert changed == {"pipeline/cli.py": 1, "pipeline/tokenizers/storage.py": 1}


def test_the_kind_is_imported_and_tokenizes(extended, tiny: TinySet, tmp_path):
    (tmp_path / "four.colours").write_text("4")
    beitforge(extended, "import-tokenizer", tmp_path / "four.colours", tmp_path / "tokenizer")
    settings = [f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.tokens={tmp_path / 'tokens'}"]
    settings += [f"data.heldout_tokens={tmp_path / 'heldout'}"]
    beitforge(extended, "tokenize", "--rank", tiny.config, *settings)
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["tokenizer"]["kind"] == "colours"


def test_the_preset_is_planned(extended):
    plan = json.loads(beitforge(extended, "plan", extended / "beitforge" / "configs" / "beit_small.yaml", "--json"))
    assert plan["parameters"] == num_parameters(Model(layers=12, width=384, heads=6), Config().tokenizer.vocabulary)


def test_the_verb_runs_and_is_in_the_help(extended, tiny: TinySet):
    assert beitforge(extended, "count", tiny.folder / "shards" / "train") == "50\n"
    assert "print the number of images in a shard set" in beitforge(extended, "--help")
