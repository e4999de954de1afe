"""Token files are checked when they are opened: a wrong token or box looks like any other."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.format.levels import without_tones
from beitforge.shards.format.manifest import TokenManifest, read_token_manifest, write_manifest
from beitforge.shards.format.tokens import TokenSet, open_token_shard, token_path, token_shard_entry, write_token_shard
from beitforge.shards.format.views import ViewPolicy, draw_views
from beitforge.shards.storage.tensors import TensorFile, open_tensors, write_tensors

KEYS = np.arange(5, dtype=np.uint64)
SIDES = np.full(5, 40)


@pytest.fixture
def folder(tmp_path) -> Path:
    """One shard of one view of five images."""
    views = draw_views(ViewPolicy(), KEYS, 0, SIDES, SIDES, without_tones(np.full(5, 100, np.float32)))
    views = dataclasses.replace(views, **{name: value[None] for name, value in vars(views).items()})
    tokens = np.arange(20).reshape(1, 5, 4)
    write_token_shard(token_path(tmp_path, "a"), tokens, views, KEYS, np.zeros(5, np.uint8), {"by": "a test"})
    entry = token_shard_entry(tmp_path, "a", "0" * 32)
    identity = {"fingerprint": "f", "vocabulary": 20, "grid": [2, 2], "input_size": [8, 8]}
    write_manifest(tmp_path, TokenManifest(shards=[entry], tokenizer=identity, policy={}, num_views=1, provenance={}))
    return tmp_path


def rows(folder: Path) -> list[bytes]:
    """Every row as the stream reads it, in bytes, and whether the image could be read."""
    opened = TokenSet(folder).shard(0, KEYS)
    return [b"".join(part.tobytes() for part in opened.row(0, row)) + bytes([opened.bad[row]]) for row in range(5)]


def as_before(folder: Path) -> None:
    """The set as a version without rows' checksums wrote it."""
    path = token_path(folder, "a")
    tensors, metadata = open_tensors(path)
    tensors = {name: np.array(value) for name, value in tensors.items() if name != "checks"}
    write_tensors(path, tensors, metadata)
    manifest = read_token_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, shards=[token_shard_entry(folder, "a", "0" * 32)]))
    assert read_token_manifest(folder).shards[0].checks_digest == ""


@pytest.mark.parametrize("old", [False, True])
def test_every_flipped_bit_of_a_token_file_is_refused(folder, old):
    """Keys and shapes cannot tell a token, a box or a flip from another; the rows' checksums can, and their digest in
    the manifest. What is refused names the file; what is not is none of the rows."""
    if old:
        as_before(folder)
    path, refused = token_path(folder, "a"), 0
    whole, expected = path.read_bytes(), rows(folder)
    assert TokenSet(folder).shard(0, KEYS).tokens[0, 4].tolist() == [16, 17, 18, 19]
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert rows(folder) == expected
        except ShardError as error:
            assert "a.safetensors" in str(error)
            refused += 1
    assert refused > 250 or (old and refused == len(range(0, len(whole), 3)))


def test_a_file_of_an_earlier_version_is_read_through_once_a_process(folder, monkeypatch):
    """A run opens and closes the same token files again and again."""
    as_before(folder)
    tokens = TokenSet(folder)
    tokens.shard(0, KEYS)
    tokens._open.clear()
    monkeypatch.setattr(TensorFile, "digest", property(lambda self: pytest.fail("read again")))
    tokens.shard(0, KEYS)
    monkeypatch.undo()
    flipped = token_path(folder, "a")
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(ShardError, match="digest differs"):
        for row in range(5):
            tokens.row(0, lambda: KEYS, 0, row)


def test_an_io_error_is_tried_again(folder, monkeypatch):
    """As it is for images."""
    as_before(folder)
    errors, real = iter([OSError(5, "Input/output error")]), os.pread

    def pread(descriptor: int, size: int, start: int) -> bytes:
        for error in errors:
            raise error
        return real(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert len(TokenSet(folder).shard(0, KEYS).keys) == 5


def test_tokens_without_views_are_refused(folder):
    """One dimension less is no token file of ours."""
    path = token_path(folder, "a")
    tensors, metadata = open_tensors(path)
    write_tensors(path, {**tensors, "tokens": np.zeros(20, np.uint16)}, metadata)
    with pytest.raises(ShardError, match="not views, samples, patches"):
        open_token_shard(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 20000,
        b'{"__metadata__":7}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[]}}',
        b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[99999999999999999999999],"data_offsets":[0,0]}}',
        b'{"a":7}',
    ],
    ids=["deep", "metadata", "offsets", "dtype", "shape", "entry"],
)
def test_headers_of_nonsense_are_one_line(tmp_path, header):
    """Whatever a header says, it is not a traceback."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ShardError, match=r"x\.safetensors is not a whole safetensors file"):
        open_tensors(path)
