"""What commit c261ee1, the last one before the packages became `beitforge`, has written is read, resumed and exported.

made_by_0.1.0.tar.xz holds a shard set, its token set, a tokenizer, a run of two ranks under ZeRO-2 with its checkpoint
of step 6 of 12, and the encoder exported at step 12: `pack`, `tokenize`, `pretrain` and `export` of that commit.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from beitforge.pipeline.cli import main
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.weights.encoder import load_encoder
from beitforge.shards.format.index import COLUMNS, DIGEST, index_path, open_index
from tests.ranks import places

ARCHIVE = Path(__file__).parent / "made_by_0.1.0.tar.xz"
CLOSE = 2e-6  # another number of ranks, and perhaps another processor, adds in another order


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive's folder, as the working folder: its paths are relative."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sets_are_clean(old, capsys):
    for part in ("train", "test"):
        assert main(["verify", f"shards/{part}", "--decode", "--workers", "1"]) == 0
        assert main(["verify", f"tokens/{part}", "--images", f"shards/{part}", "--workers", "1"]) == 0
    assert capsys.readouterr().out.count("clean") == 4


def test_index_adds_what_indexes_have_today(old, capsys):
    """Views drawn from then on are of today's arithmetic; tokens made before fit as they did, and what `pack` said of
    its shards is kept."""
    before = open_index(index_path(Path("shards/train"), "shard-000000"))
    assert not before.has_tones
    assert main(["index", "shards/train", "--workers", "1"]) == 0
    after = open_index(index_path(Path("shards/train"), "shard-000000"))
    assert after.has_tones and after.metadata.items() >= {**before.metadata, DIGEST: after.metadata[DIGEST]}.items()
    assert all(np.array_equal(getattr(after, name), getattr(before, name)) for name in COLUMNS)
    assert main(["verify", "shards/train", "--decode", "--workers", "1"]) == 0
    assert main(["verify", "tokens/train", "--images", "shards/train", "--workers", "1"]) == 0
    assert main(["index", "shards/train", "--workers", "1"]) == 0
    assert capsys.readouterr().out.count("clean") == 2 and open_index(after.path).digest == after.digest


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_resumed_exported_and_reported(old, ranks):
    """On one rank, and on two as it was saved: steps 7 to 12 have the losses that the old version went on to log, and
    end in its weights."""
    before = {line["step"]: line["loss"] for line in read_metrics(old / "run", "train")}
    words = [sys.executable, "-W", "ignore", "-m", "beitforge", "pretrain", "--rank", "config.yaml"]
    words += [f"train.micro_batch={4 // ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(words, env={**environment, **place}, stderr=subprocess.PIPE, text=True)
        for place in places(ranks)
    ]
    said = "".join(process.communicate(timeout=240)[1] for process in running)
    assert [process.returncode for process in running] == [0] * ranks, said
    assert "from step 6" in said and said.count("took no digests") == 1, said
    assert ("laying it out" in said) == (ranks == 1)
    after = {line["step"]: line["loss"] for line in read_metrics(old / "run", "train")}
    assert sorted(after) == list(range(1, 13)) and after == pytest.approx(before, rel=CLOSE)

    assert main(["export", "run", "exported"]) == 0
    theirs, ours = load_file("encoder/model.safetensors"), load_file("exported/model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in theirs.items())
    assert main(["report", "run"]) == 0
    assert "step 12" in (old / "run" / "report.html").read_text(encoding="utf-8")


def test_an_encoder_is_loaded_bit_for_bit(old):
    encoder, _ = load_encoder(old / "encoder")
    state, file = encoder.state_dict(), load_file("encoder/model.safetensors")
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in file.items())
