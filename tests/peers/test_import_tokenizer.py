"""Every family of tokenizers, from its published file to a pretraining run that does not know the difference."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.stages import import_tokenizer, report, tokenize
from beitforge.pipeline.tokenizers.storage import load_tokenizer
from beitforge.shards.errors import ShardError
from tests.peers import test_dalle, test_vqkd
from tests.ranks import run_ranks

dall_e = pytest.importorskip("dall_e")
VQKD = dataclasses.replace(test_vqkd.SMALL, vocabulary=64)


def source(kind: str, folder: Path, tiny) -> Path:
    """What its publisher would serve, with random weights."""
    folder.mkdir()
    if kind == "own":
        return tiny.folder / "tokenizer"
    if kind == "vqkd":
        needed, rest = test_vqkd.published(VQKD)
        return test_vqkd.checkpoint(folder, test_vqkd.drawn(needed | rest))
    small = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}
    test_dalle.saved(test_dalle.randomised(dall_e.Encoder(**small)), folder / "encoder.pkl")
    if kind == "dalle":
        test_dalle.saved(test_dalle.randomised(dall_e.Decoder(n_init=16, **small)), folder / "decoder.pkl")
    return folder / "encoder.pkl" if kind == "encoder alone" else folder


# vocabulary, pixels a token stands for, filter, whether it decodes to pixels
KINDS = {
    "own": (64, 8, "lanczos", True),
    "dalle": (512, 8, "lanczos", True),
    "encoder alone": (512, 8, "lanczos", False),
    "vqkd": (64, 8, "bicubic", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_its_file_to_a_run(tiny, tmp_path, capfd, kind):
    vocabulary, stride, resample, decodes = KINDS[kind]
    folder = tmp_path / "tokenizer"
    assert import_tokenizer.run(source(kind, tmp_path / "source", tiny), folder, Size(32, 32)) == 0
    said = capfd.readouterr().err
    tokenizer, identity = load_tokenizer(folder)
    assert identity["fingerprint"] in said
    assert f"tokenizer.input_size=32 tokenizer.stride={stride} tokenizer.vocabulary={vocabulary}" in said
    assert (identity["vocabulary"], identity["filter"], tokenizer.decodes) == (vocabulary, resample, decodes)

    settings = [f"data.tokenizer={folder}", f"data.tokens={tmp_path / 'tokens'}", "train.duration=3 steps"]
    settings += [f"data.heldout_tokens={tmp_path / 'apart'}", f"tokenizer.vocabulary={vocabulary}", "view.num_views=2"]
    config = load_config(str(tiny.config), [*settings, f"train.run={tmp_path / 'run'}"])
    assert tokenize.run(config) == 0
    tokens = pretraining(config).stream.batch(torch.arange(50).numpy()).tokens
    assert tokens.shape == (50, 16) and 0 <= tokens.min() <= tokens.max() < vocabulary
    done = run_ranks("beitforge", "pretrain", "--rank", tiny.config, *settings, f"train.run={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run", "train")[-1]["step"] == 3
    assert report.run([tmp_path / "run"], data=True) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count(">masked<") == 8
    assert page.count(">predicted<") == (8 if decodes else 0)
    assert decodes or "has no decoder to pixels" in page


def test_the_same_tokenizer_keeps_its_fingerprint(tiny, tmp_path):
    """Imported from a folder of ours it is still itself, so its tokens still belong to it."""
    assert import_tokenizer.run(tiny.folder / "tokenizer", tmp_path / "copy", None) == 0
    ours, theirs = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tiny.folder / "tokenizer", tmp_path / "copy")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("dalle", Size(100, 100), "is not a multiple of 8"),
        ("dalle", Size(4, 4), "is not a multiple of 8"),
        ("vqkd", Size(48, 48), "takes 32 alone"),
    ],
)
def test_a_size_it_cannot_have_is_refused_before_anything_is_written(tiny, tmp_path, kind, size, words):
    with pytest.raises(ConfigError, match=words):
        import_tokenizer.run(source(kind, tmp_path / "source", tiny), tmp_path / "out", size)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(ShardError, match="is not empty"):
        import_tokenizer.run(tiny.folder / "tokenizer", tmp_path / "full", None)
    with pytest.raises(ConfigError, match="does not exist"):
        import_tokenizer.run(tmp_path / "nowhere", tmp_path / "out", None)
