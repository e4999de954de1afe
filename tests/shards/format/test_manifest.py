"""A manifest is believed only where its values are of the right kind: counts decide the order of the whole set."""

import json
from pathlib import Path
from typing import Any

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format.manifest import (
    ImageManifest,
    ImageShard,
    TokenManifest,
    TokenShard,
    read_image_manifest,
    read_token_manifest,
    write_manifest,
)

IMAGES = ImageManifest(
    shards=[ImageShard(name=name, samples=3, bytes=10240, digest="d", index_digest="i") for name in "ab"],
    classes=["cat"],
    made_by={},
)
TOKENS = TokenManifest(
    shards=[TokenShard(name="a", samples=3, digest="d", image_digest="i")],
    tokenizer={"fingerprint": "f", "vocabulary": 8, "grid": [2, 2]},
    policy={},
    num_views=2,
    provenance={},
)


def put(content: Any, place: list, value: object) -> None:
    for step in place[:-1]:
        content = content[step]
    content[place[-1]] = value


def edited(folder: Path, place: list, value: object) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    put(content, place, value)
    del content["digest"]  # as earlier versions wrote it; else it would vouch for what it says
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("value", [None, "12", 1.5, True, -1, 0, [], 10**30, 21], ids=str)
@pytest.mark.parametrize("shard", [0, 1])
def test_counts_are_counts(tmp_path, shard, value):
    """Nothing and less would leave the shard out of every epoch; 21 images have no room in 10240 bytes."""
    write_manifest(tmp_path, IMAGES)
    assert read_image_manifest(tmp_path) == IMAGES
    edited(tmp_path, ["shards", shard, "samples"], value)
    with pytest.raises(ShardError, match=r"manifest\.json is not what schema 1 asks for .*samples is"):
        read_image_manifest(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["shards"], []),
        (["shards"], "ab"),
        (["shards", 0], 7),
        (["shards", 0, "name"], True),
        (["shards", 0, "bytes"], "10240"),
        (["shards", 0, "index_digest"], None),
        (["classes"], {"cat": 0}),
        (["classes", 0], 0),
        (["made_by"], []),
    ],
    ids=str,
)
def test_image_manifests_of_other_types(tmp_path, place, value):
    """One line that names the file."""
    write_manifest(tmp_path, IMAGES)
    edited(tmp_path, place, value)
    with pytest.raises(ShardError, match=r"^[^\n]*manifest\.json is not what schema 1 asks for [^\n]*$"):
        read_image_manifest(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["shards", 0, "samples"], 0),
        (["shards", 0, "image_digest"], 7),
        (["tokenizer"], "dVAE"),
        (["tokenizer", "grid"], [2]),
        (["tokenizer", "grid"], [2, 0]),
        (["tokenizer", "vocabulary"], "8192"),
        (["policy"], None),
        (["num_views"], 0),
        (["num_views"], 2.0),
        (["provenance"], "mine"),
    ],
    ids=str,
)
def test_token_manifests_of_other_types(tmp_path, place, value):
    """One line that names the file."""
    write_manifest(tmp_path, TOKENS)
    assert read_token_manifest(tmp_path) == TOKENS
    edited(tmp_path, place, value)
    with pytest.raises(ShardError, match=r"^[^\n]*manifest\.json is not what schema 1 asks for [^\n]*$"):
        read_token_manifest(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "read"), [(IMAGES, read_image_manifest), (TOKENS, read_token_manifest)], ids=["images", "tokens"]
)
def test_no_changed_character_is_believed(tmp_path, manifest, read):
    """Numbers that are possible, and words that nobody compares, the manifest's own digest vouches for."""
    write_manifest(tmp_path, manifest)
    path, refused = tmp_path / "manifest.json", 0
    whole = path.read_text()
    for place in range(len(whole)):
        path.write_text(whole[:place] + chr(ord(whole[place]) ^ 1) + whole[place + 1 :])
        try:
            assert read(tmp_path) == manifest
        except ShardError as error:
            assert "manifest.json" in str(error) or str(tmp_path) in str(error)
            refused += 1
    assert refused > len(whole.replace(" ", "").replace("\n", "")) - 10
