"""A set packed with --fast-regions is trained on as the plain one is: the same tokens and batches, to the bit."""

import shutil

import numpy as np
import pytest
import torch

from beitforge.pipeline.cli import main
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.doctor import data as checks_data
from beitforge.pipeline.doctor.findings import Local
from beitforge.pipeline.stages import tokenize
from beitforge.shards.decode import codec


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="needs libjpeg-turbo's jpegtran")
def test_from_packing_to_a_batch(tiny, tmp_path, capsys, monkeypatch):
    shards, tokens = tmp_path / "shards", tmp_path / "tokens"
    where = [str(tiny.folder / "images" / "train"), str(shards)]
    assert main(["pack", *where, "--samples-per-shard", "16", "--workers", "1", "--fast-regions"]) == 0
    assert "rewritten for fast regions 50" in capsys.readouterr().out
    assert main(["verify", str(shards), "--decode", "--workers", "1"]) == 0
    assert "50 with fast regions" in capsys.readouterr().out
    assert main(["index", str(shards), "--again", "--workers", "1"]) == 0
    assert "images with fast regions: 50" in capsys.readouterr().out
    settings = [f"data.images={shards}", f"data.tokens={tokens}", "data.heldout_images=", "data.heldout_tokens="]
    config = load_config(str(tiny.config), settings)
    assert tokenize.run(config) == 0
    plain, fast = pretraining(load_config(str(tiny.config), [])), pretraining(config)
    expected = plain.stream.batch(np.arange(100)).tensors()
    spliced = []
    monkeypatch.setattr(codec.regions, "splice", counting(codec.regions.splice, spliced))
    found = fast.stream.batch(np.arange(100)).tensors()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(spliced) > 60 and None not in spliced
    local = Local("here", 0)
    checks_data.sets(config, 3.0, local)
    assert any("50 of their images with fast regions" in finding.what for finding in local.found)


def counting(splice, results: list):
    def wrapped(*words):
        results.append(splice(*words))
        return results[-1]

    return wrapped


def test_without_jpegtran_pack_ends_with_one_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["pack", str(tiny.folder / "images" / "train"), str(tmp_path / "shards"), "--fast-regions"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and "apt-get install libjpeg-turbo-progs" in said
    assert not (tmp_path / "shards").exists()
