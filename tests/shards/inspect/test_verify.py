"""Verifying: a clean set is clean, and each kind of harm is found, named, and found together with the others."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format.index import COLUMNS, index_path, open_index
from beitforge.shards.format.manifest import TokenManifest, TokenShard, read_image_manifest, write_manifest
from beitforge.shards.format.tokens import token_path, write_token_shard
from beitforge.shards.format.views import ViewPolicy, Views, draw_views
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.inspect.verify_tokens import verify_tokens
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.storage.reading import file_digest
from beitforge.shards.storage.tensors import BLOCK_SUMS, open_tensors, with_checks, write_tensors
from tests.shards.made_images import two_classes

VOCABULARY, GRID, NUM_VIEWS = 50, (2, 3), 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(two_classes(folder / "in", 6), folder / "set", PackOptions(samples_per_shard=5), "1%", 1)
    return folder / "set"


@pytest.fixture
def images(packed, tmp_path) -> Path:
    """A copy to harm: shards of 5, 5 and 2 samples."""
    return shutil.copytree(packed, tmp_path / "images")


def findings(folder: Path, decode: bool = False) -> list[str]:
    found: list[str] = []
    verify_images(folder, decode, 1, found.append)
    return found


def rewrite_index(folder: Path, name: str, column: str, row: int, value: object) -> None:
    """Change one cell of an index, and make the manifest agree: only the tar can then contradict it."""
    index = open_index(index_path(folder, name))
    columns = {key: np.array(values) for key, values in index.columns.items()}
    columns[column][row] = value
    del columns[BLOCK_SUMS]
    path = index_path(folder, name)
    write_tensors(path, with_checks(columns, index.metadata), index.metadata, BLOCK_SUMS)
    manifest, digests = read_image_manifest(folder), {"index_digest": file_digest(path)}
    digests["checks_digest"] = open_index(path).checks_digest
    shards = [dataclasses.replace(one, **digests) if one.name == name else one for one in manifest.shards]
    write_manifest(folder, dataclasses.replace(manifest, shards=shards))


def flip_bit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_clean_set_is_clean(images, workers):
    """No false alarm, with decoding or without."""
    found: list[str] = []
    for decode in (False, True):
        verify_images(images, decode, workers, found.append)
    assert found == []


def test_one_flipped_bit_in_a_image_is_found_and_placed(images):
    """No JPEG decoder sees it; the digest says which tar, the checksum which image."""
    index = open_index(index_path(images, "shard-000001"))
    flip_bit(images / "shard-000001.tar", int(index.image_offset[2]) + 400)
    found = findings(images)
    assert len(found) == 2
    assert "shard-000001.tar is not the tar the manifest lists" in found[0]
    assert f"shard-000001.tar row 2 ({index.key(2)}): the image's bytes are not what was packed" in found[1]


def test_one_flipped_bit_anywhere_in_a_tar_is_found(images):
    """Headers, labels, padding, the end: no byte of a tar is unguarded."""
    path = images / "shard-000002.tar"
    whole = path.read_bytes()
    for at in range(0, len(whole), 997):
        flip_bit(path, at)
        assert findings(images), f"byte {at}"
        path.write_bytes(whole)
    assert findings(images) == []


def test_every_harm_is_reported_not_only_the_first(images):
    """One run names everything there is to repair."""
    (images / "shard-000000.tar").unlink()
    index_path(images, "shard-000001").unlink()
    path = images / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:1800])
    shutil.copy(images / "shard-000001.tar", images / "stray.tar")
    found = "\n".join(findings(images))
    for expected in (
        "shard-000000.tar is missing",
        "shard-000001.index.safetensors is missing",
        "shard-000002.tar has 1800 bytes, the manifest says",
        "shard-000002.tar: member ",
        "inside a member",
        "stray.tar is not in the manifest",
    ):
        assert expected in found


def test_a_damaged_index_is_found(images):
    """A cell flipped by the disk would otherwise cut another view or read another image."""
    path = index_path(images, "shard-000000")
    flip_bit(path, path.stat().st_size - 3)
    assert any("is not the index the manifest lists (digest differs)" in finding for finding in findings(images))


@pytest.mark.parametrize("column", sorted([*COLUMNS, "tones"]))
def test_every_column_is_checked_against_the_tar(images, column):
    """Even an index that its manifest vouches for is not believed: each column is compared with the tar."""
    before = open_index(index_path(images, "shard-000001")).columns[column][3]
    rewrite_index(images, "shard-000001", column, 3, before + 1)
    found = findings(images, decode=True)
    assert found and all("shard-000001" in finding and "row 3" in finding for finding in found)


def test_a_key_used_twice_is_found(images):
    """Two shards holding one key, as after copying a tar under another name and listing it."""
    for suffix in (".tar", ".index.safetensors"):
        shutil.copy(images / f"shard-000000{suffix}", images / f"shard-000009{suffix}")
    manifest = read_image_manifest(images)
    twin = dataclasses.replace(manifest.shards[0], name="shard-000009")
    write_manifest(images, dataclasses.replace(manifest, shards=[*manifest.shards, twin]))
    found = findings(images)
    assert len(found) == 5 and all("in shard-000000 row" in line and "shard-000009 row" in line for line in found)


def test_an_unfinished_set_cannot_be_verified(images):
    """Without a manifest there is nothing to hold the files against."""
    (images / "manifest.json").unlink()
    with pytest.raises(ShardError, match="unfinished"):
        findings(images)


@pytest.fixture
def tokens(images, tmp_path) -> Path:
    """A token set of `images`: drawn views, arbitrary tokens."""
    folder = tmp_path / "tokens"
    entries = []
    for image in read_image_manifest(images).shards:
        write_tokens(folder, images, image.name)
        digest = file_digest(token_path(folder, image.name))
        entries.append(TokenShard(name=image.name, samples=image.samples, digest=digest, image_digest=image.digest))
    tokenizer = {"fingerprint": "0" * 64, "vocabulary": VOCABULARY, "grid": list(GRID), "input_size": [16, 24]}
    policy = dataclasses.asdict(ViewPolicy())
    write_manifest(
        folder,
        TokenManifest(shards=entries, tokenizer=tokenizer, policy=policy, num_views=NUM_VIEWS, provenance={}),
    )
    return folder


def write_tokens(folder: Path, images: Path, name: str) -> None:
    index = open_index(index_path(images, name))
    drawn = [
        draw_views(ViewPolicy(), index.key_hash, k, index.width, index.height, index.greys) for k in range(NUM_VIEWS)
    ]
    views = Views(*(np.stack([getattr(view, field) for view in drawn]) for field in Views.__dataclass_fields__))
    values = np.random.default_rng(len(index)).integers(0, VOCABULARY, (NUM_VIEWS, len(index), GRID[0] * GRID[1]))
    write_token_shard(token_path(folder, name), values, views, index.key_hash, np.zeros(len(index), np.uint8), {})


def token_findings(folder: Path, images: Path, paired: bool = True) -> list[str]:
    found: list[str] = []
    verify_tokens(folder, images, paired, 1, found.append)
    return found


def rewrite_tokens(folder: Path, name: str, tensor: str, at: tuple, value: object) -> None:
    """Change one value of a token file, and make the manifest agree."""
    path = token_path(folder, name)
    mapped, metadata = open_tensors(path)
    tensors = {key: np.array(values) for key, values in mapped.items()}
    tensors[tensor][at] = value
    write_tensors(path, tensors, metadata)
    content = json.loads((folder / "manifest.json").read_text())
    for shard in content["shards"]:
        if shard["name"] == name:
            shard["digest"] = file_digest(path)
    content.pop("digest", None)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("paired", [True, False])
def test_a_clean_token_set_is_clean(images, tokens, paired):
    """No false alarm, alone or beside its images."""
    assert token_findings(tokens, images, paired) == []


@pytest.mark.parametrize(
    ("tensor", "at", "value", "message"),
    [
        ("tokens", (0, 1, 2), VOCABULARY, "1 tokens of 50 or more"),
        ("boxes", (1, 2, 2), 0, "1 crop boxes without area"),
        ("boxes", (1, 2, 0), 40000, r"view 1 of row 2 \(.*\) has the box \[40000, .* outside its image of 48x32"),
        ("flips", (0, 0), 2, "1 flips other than 0 and 1"),
        ("orders", (0, 0), 6, "1 jitter orders of 6 or more"),
        ("jitters", (0, 0, 1), float("nan"), "1 jitter factors that are negative or not finite"),
        ("bad", (4,), 2, "1 marks for bad rows"),
        ("keys", (3,), 1, r"not the images' rows \(first difference in row 3\)"),
    ],
)
def test_impossible_records_are_found(images, tokens, tensor, at, value, message):
    """Values a damaged or foreign tokenizer job leaves, though every digest agrees."""
    rewrite_tokens(tokens, "shard-000001", tensor, at, value)
    (finding,) = token_findings(tokens, images)
    assert "shard-000001.safetensors" in finding
    assert re.search(message, finding)


def test_rows_marked_bad_are_not_looked_at(images, tokens):
    """Their records are zeros by contract."""
    for tensor, value in (("bad", 1), ("boxes", 0)):
        at = (3,) if tensor == "bad" else (slice(None), 3)
        rewrite_tokens(tokens, "shard-000000", tensor, at, value)
    assert token_findings(tokens, images) == []


def test_damaged_and_missing_token_files_are_both_found(images, tokens):
    """All findings, one line each."""
    path = token_path(tokens, "shard-000000")
    flip_bit(path, path.stat().st_size - 1)
    token_path(tokens, "shard-000001").unlink()
    write_tokens(tokens, images, "shard-000002")
    found = "\n".join(token_findings(tokens, images))
    assert "shard-000000.safetensors is not the file the manifest lists" in found
    assert "shard-000001.safetensors is missing" in found
    assert "shard-000002" not in found


def test_tokens_of_another_shape_are_found(images, tokens):
    """A grid that the manifest does not promise."""
    content = json.loads((tokens / "manifest.json").read_text())
    content["tokenizer"]["grid"] = [3, 3]
    content.pop("digest", None)
    (tokens / "manifest.json").write_text(json.dumps(content))
    found = token_findings(tokens, images)
    assert len(found) == 3 and all("holds tokens of shape (2, " in finding for finding in found)


def test_tokens_of_other_images_are_found(images, tokens, tmp_path):
    """The pairing: the same names, other images."""
    pack(two_classes(tmp_path / "in", 5), tmp_path / "other", PackOptions(samples_per_shard=5), "1%", 1)
    found = token_findings(tokens, tmp_path / "other")
    assert "does not list the image set's shards" in found[0]
    assert any("the token rows are not the images' rows" in finding for finding in found)
