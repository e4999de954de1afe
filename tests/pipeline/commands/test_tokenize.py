"""`tokenize` by many processes that know nothing of each other: each shard once, the same bytes, killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.stages import tokenize
from beitforge.shards.format.manifest import read_token_manifest
from tests.conftest import ROOT


def start(tiny, out: Path, rank: int = 0, world: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "beitforge", "tokenize", "--rank", str(tiny.config), *folders(out)]
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def folders(out: Path) -> list[str]:
    return [f"data.tokens={out}/train", f"data.heldout_tokens={out}/test"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_processes_by_hand_share_the_shards(tiny, tmp_path):
    """Three processes, one of them killed at once: the others take over what it held; the same files as alone."""
    processes = [start(tiny, tmp_path, rank=rank, world=3) for rank in range(3)]
    time.sleep(2.0)
    processes[2].send_signal(signal.SIGKILL)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes[:2]] == [0, 0], errors
    for part in ("train", "test"):
        assert contents(tmp_path / part) == contents(tiny.folder / "tokens" / part)
        made = read_token_manifest(tmp_path / part)
        assert made.fingerprint == read_token_manifest(tiny.folder / "tokens" / part).fingerprint
        assert not list((tmp_path / part).glob("*.claim"))


def test_goes_on_after_a_kill(tiny, tmp_path):
    """A shard's file is there whole or not at all; a second start makes only what is missing."""
    whole = contents(tiny.folder / "tokens" / "train")
    out = tmp_path / "train"
    out.mkdir()
    first = sorted(whole)[0]
    (out / first).write_bytes(whole[first])
    (out / f"{sorted(whole)[1]}.partial-12345678").write_bytes(b"half")
    before = (out / first).stat().st_mtime_ns
    process = start(tiny, tmp_path)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert contents(out) == whole
    assert (out / first).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "setting", ["view.flip=0.25", "view.num_views=2", "data.images={test}"], ids=["policy", "views", "images"]
)
def test_tokens_of_another_task_are_not_mixed(tiny, tmp_path, setting):
    """A folder that holds another tokenizer's or policy's files is left alone, with one line."""
    out = tmp_path / "train"
    out.mkdir()
    for name, data in contents(tiny.folder / "tokens" / "train").items():
        (out / name).write_bytes(data)
    setting = setting.format(test=tiny.folder / "shards" / "test")
    config = load_config(
        str(tiny.config), [*folders(tmp_path), setting, "data.heldout_images=", "data.heldout_tokens="]
    )
    with pytest.raises(ConfigError, match="choose another folder"):
        tokenize.run(config)
    assert contents(out) == contents(tiny.folder / "tokens" / "train")


@pytest.mark.parametrize("heldout", ["{out}/train", "{out}/other/../train", "{out}/link", "{out}/train/test", "{out}"])
def test_each_set_of_tokens_has_a_folder_of_its_own(tiny, tmp_path, heldout):
    (tmp_path / "link").symlink_to(tmp_path / "train")
    words = [f"data.tokens={tmp_path}/train", f"data.heldout_tokens={heldout.format(out=tmp_path)}"]
    with pytest.raises(ConfigError, match="each set of tokens needs a folder of its own"):
        tokenize.run(load_config(str(tiny.config), words))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_tokenizer_of_another_grid_is_refused(tiny):
    config = load_config(str(tiny.config), ["model.patch_size=4", "tokenizer.input_size=64"])
    with pytest.raises(ConfigError, match="grid"):
        tokenize.run(config)


def test_damaged_weights_are_refused(tiny, tmp_path):
    """The tokenizer's fingerprint is of its weights: one changed byte is another tokenizer."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer.safetensors"):
        (folder / name).write_bytes((tiny.folder / "tokenizer" / name).read_bytes())
    weights = folder / "tokenizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = load_config(str(tiny.config), [*folders(tmp_path), f"data.tokenizer={folder}"])
    with pytest.raises(ConfigError, match="sha256 differs"):
        tokenize.run(config)
    assert json.loads((folder / "tokenizer.json").read_text())["shape"]["vocabulary"] == 64
