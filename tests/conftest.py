"""A tiny real data set, made once a session: generated images, packed, tokenized by a random dVAE."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

# Tests share the cores with each other and with the processes they start. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
EXTRAS = (
    "peers",
    "cluster",
    "browser",
    "nvme",
)  # folders whose tests need more than launch.sh installs, and their markers
# Files that take longest, started first: with several workers none of them is left to one worker at the end.
LONGEST = (
    "test_kills.py",
    "test_trainer.py",
    "test_demo.py",
    "test_evaluations.py",
    "test_finetune.py",
    "test_fused_training.py",
    "test_deepspeed_launcher.py",
    "test_fused.py",
    "test_watch.py",
    "test_rehearsal.py",
    "test_doctor.py",
    "test_remote.py",
    "test_elastic.py",
    "test_exchange.py",
)
TINY = {
    "view": {"num_views": 3},
    "tokenizer": {"input_size": 32, "vocabulary": 64, "width": 16, "embedding": 8, "residual_blocks": 1},
    "model": {"input_size": 32, "patch_size": 8, "layers": 2, "width": 32, "heads": 2},
    "mask": {"num_patches": 6, "min_block": 2},
    "optimizer": {"lr": 1e-3, "warmup": "4 steps"},
    "train": {"duration": "24 steps", "global_batch": 8, "micro_batch": 4, "precision": "fp32", "zero_stage": 2},
    "loader": {"workers": 0, "prefetch": 2, "chunk": 4, "window": 2, "lanes": 4},
    "checkpoint": {"every": "4 steps", "keep": 2},
    "log": {"every_steps": 2, "heldout_every": "12 steps", "heldout_samples": 8, "tensorboard": False},
}


PEERS_REQUIRED = os.environ.get("BEITFORGE_PEERS") == "1"


def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked peers("timm", …) where a named package is missing."""
    for marker in item.iter_markers("peers"):
        missing = [package for package in marker.args if not installed(package)]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}, which `./launch.sh setup peers` installs")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """With BEITFORGE_PEERS=1 the extras are installed, so that skipping a test marked peers is a failure."""
    report = (yield).get_result()
    if report.skipped and PEERS_REQUIRED and item.get_closest_marker("peers"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BEITFORGE_PEERS=1 says that its packages are installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in EXTRAS:
            item.add_marker(folder)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Workers take whole files, and one of them all of tests/cluster, which shares one lab."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def write_images(folder: Path, count: int, classes: int, seed: int = 0, size: tuple[int, int] | None = None) -> None:
    """`count` JPEGs of coloured gradients, varied in size unless one is given, one folder per class."""
    from beitforge.shards.decode.codec import encode

    generator = np.random.default_rng(seed)
    for number in range(count):
        height, width = size or generator.integers(40, 72, size=2)
        ramp = np.linspace(0, 1, width)[None, :, None] * generator.uniform(0, 255, 3)
        noise = generator.uniform(-30, 30, (height, width, 3))
        pixels = np.clip(ramp + noise + generator.uniform(0, 80), 0, 255).astype(np.uint8)
        path = folder / f"class{number % classes}" / f"picture{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels, "jpg", 90))


@dataclasses.dataclass(frozen=True)
class TinySet:
    """Folders of the tiny data set and a config that uses them."""

    folder: Path
    config: Path

    def overrides(self, run: Path, *more: str) -> list[str]:
        return [f"train.run={run}", *more]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small operators on shared cores: threads wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    """50 training and 10 held-out images, packed and tokenized through the real commands."""
    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "images" / "train", 50, 5)
    write_images(folder / "images" / "test", 10, 5, seed=1)
    for part in ("train", "test"):
        where = [str(folder / "images" / part), str(folder / "shards" / part)]
        command = [sys.executable, "-m", "beitforge", "pack", *where, "--samples-per-shard", "16", "--workers", "1"]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    data = {"images": "shards/train", "tokens": "tokens/train", "tokenizer": "tokenizer"}
    data |= {"heldout_images": "shards/test", "heldout_tokens": "tokens/test"}
    tree = {"data": {name: str(folder / path) for name, path in data.items()}, **TINY}
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(tree))

    from beitforge.pipeline.config.loading import load_config
    from beitforge.pipeline.stages import tokenize
    from beitforge.pipeline.tokenizers.dvae import Dvae, save_dvae

    loaded = load_config(str(config), [])
    save_dvae(folder / "tokenizer", Dvae(loaded.tokenizer, seed=3), loaded.tokenizer)
    assert tokenize.run(loaded) == 0
    return TinySet(folder, config)
