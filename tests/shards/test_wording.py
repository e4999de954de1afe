"""Counts and articles in messages."""

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import read_image_manifest, read_token_manifest
from beitforge.shards.wording import counted, with_article


@pytest.mark.parametrize(("number", "expected"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards")])
def test_counts(number, expected):
    assert counted(number, "shard") == expected


@pytest.mark.parametrize(("noun", "expected"), [("image shard set", "an image shard set"), ("token", "a token")])
def test_articles(noun, expected):
    assert with_article(noun) == expected


@pytest.mark.parametrize(("read", "expected"), [(read_image_manifest, "an image"), (read_token_manifest, "a token")])
def test_a_missing_set_is_named(tmp_path, read, expected):
    with pytest.raises(ShardError, match=f"; {expected} shard set is expected there: "):
        read(tmp_path / "nowhere")
