"""Statistics of token sets, against counts made by hand."""

import json
import math

import numpy as np
import pytest

from beitforge.shards.format.manifest import TokenManifest, TokenShard, write_manifest
from beitforge.shards.format.tokens import token_path, write_token_shard
from beitforge.shards.format.views import Views
from beitforge.shards.inspect.stats import table, token_stats
from beitforge.shards.storage.reading import file_digest


@pytest.fixture
def tokens(tmp_path):
    """Two shards of two views of 1 x 2 patches: tokens 0, 1, 2, 3 twice each; one bad row full of 7."""
    entries = []
    for name, values in (("a", [[[0, 1], [7, 7]], [[2, 3], [7, 7]]]), ("b", [[[0, 1]], [[2, 3]]])):
        array = np.array(values, np.uint16)
        samples = array.shape[1]
        views = Views(
            np.ones((2, samples, 4), np.uint32),
            np.zeros((2, samples), np.uint8),
            np.ones((2, samples, 3), np.float32),
            np.zeros((2, samples), np.uint8),
            np.full((2, samples, 3), 128, np.uint8),
        )
        bad = np.array([0, 1][:samples], np.uint8)
        write_token_shard(token_path(tmp_path, name), array, views, np.arange(samples, dtype=np.uint64), bad, {})
        digest = file_digest(token_path(tmp_path, name))
        entries.append(TokenShard(name=name, samples=samples, digest=digest, image_digest=""))
    tokenizer = {"fingerprint": "f00", "vocabulary": 8, "grid": [1, 2], "input_size": [8, 16]}
    write_manifest(tmp_path, TokenManifest(shards=entries, tokenizer=tokenizer, policy={}, num_views=2, provenance={}))
    return tmp_path


def test_codebook_use_and_perplexity(tokens):
    """Four tokens in equal use: perplexity 4; the zeros of unreadable images do not count as tokens."""
    stats = token_stats(tokens)
    assert (stats["samples"], stats["shards"], stats["views"], stats["grid"]) == (3, 2, 2, "1x2")
    assert (stats["tokens used"], stats["codebook use"], stats["unreadable images"]) == (4, 0.5, 1)
    assert math.isclose(stats["perplexity"], 4.0)
    assert math.isclose(stats["commonest token's share"], 0.25)
    assert "vocabulary               8" in table(stats)
    json.dumps(stats)
