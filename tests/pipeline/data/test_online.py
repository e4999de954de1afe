"""`data.tokens: online`: the tokenizer inside the step, on a fresh view every time."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import fitting_tokenizer, heldout, pretraining
from beitforge.pipeline.errors import ConfigError
from beitforge.pipeline.runs.jsonl import read_metrics
from beitforge.pipeline.stages import import_tokenizer, tokenize
from beitforge.pipeline.training.objectives import online_tokens
from beitforge.shards.format.levels import without_tones
from beitforge.shards.format.views import draw_views
from tests.ranks import run_ranks

ONLINE = "data.tokens=online"


def start(tiny, run: Path, *settings: str) -> subprocess.CompletedProcess:
    return run_ranks("beitforge", "pretrain", "--rank", tiny.config, f"train.run={run}", *settings)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run, "train")]


def test_the_first_epoch_is_that_of_one_recorded_view(tiny, tmp_path):
    """With K = 1 the recorded view is number 0, and so is the online view of epoch 0: the same losses until epoch 1."""
    one_view = ["view.num_views=1", f"data.tokens={tmp_path / 'tokens'}", f"data.heldout_tokens={tmp_path / 'apart'}"]
    assert tokenize.run(load_config(str(tiny.config), one_view)) == 0
    steps = ["train.duration=8 steps", "log.every_steps=1", "checkpoint.every=100 steps", "view.num_views=1"]
    alone = ["data.heldout_images=", "data.heldout_tokens="]
    for name, words in (("recorded", [one_view[1]]), ("online", [ONLINE])):
        result = start(tiny, tmp_path / name, *steps, *words, *alone)
        assert result.returncode == 0, result.stderr
    recorded, online = losses(tmp_path / "recorded"), losses(tmp_path / "online")
    assert online[:6] == pytest.approx(recorded[:6], rel=1e-6)  # 48 of 50 samples
    assert online[7] != pytest.approx(recorded[7], rel=1e-4)


def test_views_are_fresh_every_epoch_and_never_those_held_out(tiny):
    """Pixels for both networks are cut by one record; no two epochs share one; a held-out view is none of them."""
    settings = [ONLINE, "data.heldout_tokens=online", f"data.heldout_images={tiny.folder / 'shards' / 'train'}"]
    config = load_config(str(tiny.config), settings)
    source, apart = pretraining(config), heldout(config)
    epochs = [
        source.stream.batch(np.arange(e * source.samples, (e + 1) * source.samples, dtype=np.int64)) for e in range(3)
    ]
    held = apart.stream.batch(np.arange(apart.samples, dtype=np.int64))
    records = [{bytes(jitter.numpy()) for jitter in batch.jitters} for batch in (*epochs, held)]
    assert len(set.union(*records)) == sum(map(len, records)) == 4 * source.samples
    assert epochs[0].tokenizer_pixels.shape == (50, 3, 32, 32)
    assert epochs[0].tokens.numel() == 0
    tokenizer, _ = fitting_tokenizer(config)
    tokens = online_tokens(tokenizer.tokenize, epochs[0])
    assert tokens.shape == (50, 16) and len(tokens.unique()) > 1


def test_both_networks_see_one_view(tiny):
    """The tokenizer's pixels are the encoder's, at its size and with its filter."""
    config = load_config(str(tiny.config), [ONLINE])
    source = pretraining(config)
    batch = source.stream.batch(np.arange(8, dtype=np.int64))
    apart = (batch.pixels.float() - batch.tokenizer_pixels.float()).abs().mean(dim=(1, 2, 3))
    crossed = (batch.pixels.float() - batch.tokenizer_pixels.roll(1, 0).float()).abs().mean(dim=(1, 2, 3))
    assert (apart < 0.5 * crossed).all(), "bicubic and Lanczos of one view are nearer than views of two images"
    assert apart.max() > 0, "two filters"


def test_a_tokenizers_filter_cuts_its_views_on_every_path(tiny, tmp_path):
    """Imported with another filter it is another tokenizer: `tokenize` and online tokens cut by that, their sets say
    so, and neither takes the other's tokens."""
    folder = tmp_path / "tokenizer"
    assert import_tokenizer.run(tiny.folder / "tokenizer", folder, None, "torch lanczos") == 0
    words = [f"data.tokenizer={folder}", "view.num_views=1", "data.heldout_images=", "data.heldout_tokens="]
    config = load_config(str(tiny.config), [*words, f"data.tokens={tmp_path / 'tokens'}"])
    assert tokenize.run(config) == 0
    recorded = pretraining(config)
    assert recorded.stream.source.tokens.manifest.tokenizer["filter"] == "torch lanczos"
    numbers = np.arange(recorded.samples, dtype=np.int64)
    cut = [
        pretraining(load_config(str(tiny.config), [*words, ONLINE, *more])).stream.batch(numbers)
        for more in ([], [f"data.tokenizer={tiny.folder / 'tokenizer'}"])
    ]
    tokenizer, _ = fitting_tokenizer(config)
    assert torch.equal(online_tokens(tokenizer.tokenize, cut[0]), recorded.stream.batch(numbers).tokens)
    apart = (cut[0].tokenizer_pixels.int() - cut[1].tokenizer_pixels.int()).abs()
    assert torch.equal(cut[0].pixels, cut[1].pixels)
    assert 0 < apart.double().square().mean() < 0.3, "two arithmetics of one filter"
    with pytest.raises(ConfigError, match="choose another folder"):
        tokenize.run(load_config(str(tiny.config), [*words[1:], f"data.tokens={tmp_path / 'tokens'}"]))


def test_a_run_does_not_change_from_recorded_to_online(tiny, tmp_path):
    run = tmp_path / "run"
    assert start(tiny, run, "train.duration=4 steps").returncode == 0
    result = start(tiny, run, "train.duration=4 steps", ONLINE)
    assert result.returncode == 2
    assert "another token set than the run was started with" in result.stderr


def test_online_tokens_are_named_by_all_that_makes_them(tiny):
    """A run continued at another precision would train on other tokens: the checkpoint names it."""
    names = {
        pretraining(load_config(str(tiny.config), [ONLINE, f"tokenizer.precision={p}"])).tokens
        for p in ("fp32", "bf16")
    }
    assert len(names) == 2 and all("views of arithmetic 3" in name for name in names)


def test_there_is_nothing_to_tokenize(tiny):
    with pytest.raises(ConfigError, match="`pretrain` makes the tokens itself"):
        tokenize.run(load_config(str(tiny.config), [ONLINE, "data.heldout_tokens=online"]))


def test_a_tokenizer_that_does_not_fit_is_one_line(tiny):
    with pytest.raises(ConfigError, match=r"vocabulary of 64, tokenizer\.vocabulary says 99"):
        pretraining(load_config(str(tiny.config), [ONLINE, "tokenizer.vocabulary=99"]))


def test_drawn_views_take_any_seed():
    """Held-out views are drawn from the complement of the seed, which is negative."""
    from beitforge.shards.format.views import ViewPolicy

    keys = np.arange(4, dtype=np.uint64)
    sides = np.full(4, 100)
    one, other = (
        draw_views(ViewPolicy(seed=seed), keys, 0, sides, sides, without_tones(np.full(4, 100, np.float32)))
        for seed in (0, ~0)
    )
    assert not np.array_equal(one.boxes, other.boxes)


def test_precision_is_put_back():
    from beitforge.pipeline.tokenizers.precision import autocast_as

    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    for precision, during in (("fp32", "ieee"), ("tf32", "tf32")):
        with autocast_as(precision, torch.device("cpu")):
            assert conv.fp32_precision == during
        assert conv.fp32_precision == before


def test_the_token_manifest_says_what_another_precision_would_change(tiny):
    import json

    manifest = json.loads((tiny.folder / "tokens" / "train" / "manifest.json").read_text())
    changed = manifest["provenance"]["tokens_changed_against_fp32"]
    assert manifest["tokenizer"]["precision"] == "fp32"
    assert set(changed) == {"fp16", "bf16"}
    assert 0 <= changed["fp16"] <= changed["bf16"] < 0.5
