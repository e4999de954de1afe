"""Columns that cannot be used: what is said of them, who says it, and that nobody waits for them."""

import json
import logging
import os
from pathlib import Path

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format import columns as columnar
from beitforge.shards.format import manifest as manifests
from beitforge.shards.format.equal_images import beside
from beitforge.shards.format.manifest import (
    ImageManifest,
    ImageShard,
    TokenManifest,
    TokenShard,
    check_columns,
    read_image_manifest,
    read_token_manifest,
    refuse_other_manifest,
    write_manifest,
)
from beitforge.shards.storage import remote, retry
from beitforge.shards.storage.cache import Cache
from beitforge.shards.storage.fetching import Fault
from tests.shards.storage.servers import http_server

PLAN = {"plan": "p"}


def images(count: int = 3) -> ImageManifest:
    shards = [
        ImageShard(name=f"s{number}", samples=2, bytes=10240, digest=f"{number:032x}", index_digest="0" * 32)
        for number in range(count)
    ]
    return ImageManifest(shards=shards, classes=["cat"], made_by=PLAN)


def tokens() -> TokenManifest:
    shards = [TokenShard(name="s0", samples=2, digest="0" * 32, image_digest="0" * 32)]
    identity = {"fingerprint": "f", "vocabulary": 8, "grid": [2, 2]}
    return TokenManifest(shards=shards, tokenizer=identity, policy={"seed": 1}, num_views=2, provenance={})


@pytest.fixture
def lines(caplog):
    """What was said of columns since the last look."""

    def look() -> list[str]:
        found = [record.getMessage() for record in caplog.records if columnar.NAME in record.getMessage()]
        caplog.clear()
        return found

    caplog.set_level(logging.WARNING)
    return look


def damage(folder: Path) -> None:
    (folder / columnar.NAME).write_bytes(bytes(3000))


def test_another_kind_is_no_damage(tmp_path, lines):
    write_manifest(tmp_path / "i", images())
    write_manifest(tmp_path / "t", tokens())
    for read, folder in ((read_image_manifest, tmp_path / "t"), (read_token_manifest, tmp_path / "i")):
        with pytest.raises(ShardError, match="give the folder of the"):
            read(folder)
    assert not beside(tmp_path / "i", read_image_manifest(tmp_path / "i"), []) and not lines()


def test_damage_beside_a_set_is_not_its_own(tmp_path, lines):
    for name in ("a", "b"):
        write_manifest(tmp_path / name, images())
    damage(tmp_path / "b")
    assert list(beside(tmp_path / "a", read_image_manifest(tmp_path / "a"), [])) == ["b"] and not lines()


@pytest.mark.parametrize("harm", [damage, lambda folder: (folder / columnar.NAME).unlink()], ids=["damaged", "missing"])
def test_one_line_says_what_helps(tmp_path, lines, harm):
    """`index` writes those of images again, `tokenize` those of tokens when it closes their folder."""
    write_manifest(tmp_path / "i", images())
    write_manifest(tmp_path / "t", tokens())
    for read, name in ((read_image_manifest, "i"), (read_token_manifest, "t")):
        harm(tmp_path / name)
        read(tmp_path / name)
        (line,) = lines()
        cure = {"i": f"have `index {tmp_path / 'i'}` write it again", "t": "run `tokenize` again, which makes both"}
        assert "all of manifest.json" in line and line.endswith(cure[name])
    (tmp_path / "i" / columnar.NAME).unlink(missing_ok=True)
    read_image_manifest(tmp_path / "i")
    assert f"{tmp_path / 'i'} has no manifest.columns" in lines()[0]
    assert not check_columns(tmp_path / "i", "images") and not lines()


def test_a_check_of_damaged_columns_says_so_once(tmp_path, lines):
    write_manifest(tmp_path, images())
    damage(tmp_path)
    assert len(check_columns(tmp_path, "images")) == 1 and not lines()


def test_what_lies_in_the_place_of_named_columns_is_ours(tmp_path):
    """But what is no file."""
    write_manifest(tmp_path, images())
    damage(tmp_path)
    refuse_other_manifest(tmp_path)
    path = tmp_path / columnar.NAME
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match=r"manifest\.columns is no regular file"):
        refuse_other_manifest(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardError, match=r"manifest\.columns is a folder"):
        refuse_other_manifest(tmp_path)
    path.rmdir()
    damage(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["columns"]
    (tmp_path / "manifest.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(ShardError, match="was not written by beitforge"):
        refuse_other_manifest(tmp_path)


def test_a_store_without_columns_is_no_wrong_address(tmp_path, lines):
    write_manifest(tmp_path / "set", images())
    (tmp_path / "set" / columnar.NAME).unlink()
    with http_server(tmp_path) as root:
        assert read_image_manifest(f"{root}/set", Cache(tmp_path / "cache", 10**9)) == images()
    (line,) = lines()
    assert "has no manifest.columns" in line and "credentials" not in line


@pytest.mark.parametrize("answer", [Fault("500"), retry.TryLater("503", 300.0), b"not these"], ids=str)
def test_columns_are_asked_for_twice_at_most(tmp_path, lines, monkeypatch, answer):
    write_manifest(tmp_path / "set", images())
    asked, slept = [], []
    real = remote.fetch

    def fetch(system, path, wanted):
        asked.append(Path(path).name)
        if not path.endswith(columnar.NAME):
            return real(system, path, wanted)
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setattr(remote, "fetch", fetch)
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    found = read_image_manifest(f"file://{tmp_path}/set", Cache(tmp_path / "cache", 10**9))
    assert found == images() and "is left aside" in lines()[-1]
    assert asked.count(columnar.NAME) <= 2 and sum(slept) < 1 and asked.count(manifests.NAME) == 1
