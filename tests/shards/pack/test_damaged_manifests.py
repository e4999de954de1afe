"""A manifest of ours that is not as it was written: the same command writes it again, and what was known is kept."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format import columns
from beitforge.shards.format.index import index_path
from beitforge.shards.format.manifest import NAME, read_image_manifest, write_manifest
from beitforge.shards.inspect.verify import verify_images
from beitforge.shards.pack.adopt import adopt
from beitforge.shards.pack.pack import pack
from beitforge.shards.pack.plan import PackOptions
from beitforge.shards.stream.image_set import ImageSet
from tests.shards.made_images import jpeg, two_classes

OPTIONS = PackOptions(samples_per_shard=4)


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(two_classes(tmp_path / "in", 3), tmp_path / "set", OPTIONS, "1%", 1)
    return tmp_path / "set"


def edit(folder: Path, **fields) -> None:
    """By hand: its digest stays what it was."""
    content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**content, **fields}, indent=1) + "\n")
    with pytest.raises(ShardError, match="its digest differs"):
        read_image_manifest(folder)


def findings(folder: Path) -> list[str]:
    found: list[str] = []
    verify_images(folder, False, 1, found.append)
    return found


def damage(folder: Path) -> None:
    (folder / columns.NAME).write_bytes(bytes(3000))


@pytest.mark.parametrize("command", ["pack", "index"])
@pytest.mark.parametrize("harm", [damage, lambda folder: (folder / columns.NAME).unlink()], ids=["damaged", "missing"])
def test_columns_are_written_again(packed, command, harm):
    before = (packed / NAME).read_bytes(), (packed / columns.NAME).read_bytes()
    harm(packed)
    if command == "pack":
        pack(packed.parent / "in", packed, OPTIONS, "1%", 1)
    adopt(packed, 1)
    assert ((packed / NAME).read_bytes(), (packed / columns.NAME).read_bytes()) == before and not findings(packed)


def test_pack_writes_a_changed_manifest_again(packed, caplog):
    before = (packed / NAME).read_bytes()
    edit(packed, classes=["one", "two"])
    done = pack(packed.parent / "in", packed, OPTIONS, "1%", 1)
    assert (packed / NAME).read_bytes() == before and done.kept == done.shards and not findings(packed)
    assert "written again" in caplog.text


def test_index_keeps_what_was_written(packed, caplog):
    """By the columns that the manifest still names."""
    before = read_image_manifest(packed)
    edit(packed, classes=["one", "two"], made_by={})
    assert adopt(packed, 1).manifest.classes == before.classes
    after = read_image_manifest(packed)
    assert after == before and not findings(packed) and "keeps the class names it had" in caplog.text


def test_index_says_what_it_cannot_keep(packed, caplog):
    edit(packed, classes=["one", "two"])
    (packed / columns.NAME).unlink()
    assert adopt(packed, 1).manifest.classes == ["0", "1"]
    assert f"{packed / NAME} is damaged" in caplog.text and "cannot keep its class names" in caplog.text


def test_columns_of_another_set_are_not_what_was_written(packed, tmp_path, caplog):
    other = read_image_manifest(packed)
    other.classes[:] = ["a", "b"]
    write_manifest(tmp_path / "other", other)
    edit(packed, classes=["one", "two"])
    (packed / columns.NAME).write_bytes((tmp_path / "other" / columns.NAME).read_bytes())
    assert adopt(packed, 1).manifest.classes == ["0", "1"] and "cannot keep" in caplog.text


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)


def test_a_reader_is_told_that_the_set_was_replaced(packed, tmp_path):
    """And not that it is damaged, which it is told of a shard that is gone."""
    opened = ImageSet(packed)
    (tmp_path / "in" / "late.jpg").write_bytes(jpeg(99))
    shutil.rmtree(packed)
    pack(tmp_path / "in", packed, PackOptions(samples_per_shard=3), "1%", 1)
    with pytest.raises(ShardError, match="set was changed while it was read: start again"):
        opened.read(0, 0)
    damaged = ImageSet(packed)
    index_path(packed, "shard-000000").write_bytes(b"")
    with pytest.raises(ShardError, match=r"shard-000000\.index") as error:
        damaged.read(0, 0)
    assert "was changed while" not in str(error.value)
