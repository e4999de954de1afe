"""A disk that errs once is asked again; a file cut or replaced under a running job is one line, never a signal."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beitforge.pipeline.data.pretraining import pretraining
from beitforge.shards.errors import Damaged, ShardError
from beitforge.shards.format.index import open_index
from beitforge.shards.format.tokens import open_token_shard
from beitforge.shards.storage import retry
from beitforge.shards.storage.reading import OpenFile, file_digest, read_whole
from beitforge.shards.storage.tensors import TensorFile, open_tensors, write_tensors
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import Stream, load
from tests.conftest import ROOT
from tests.shards.stream.test_stream import copied, moved, split, tiny_config

SAMPLES = 50
Read = Callable[[int, int, int], bytes]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.001,) * 4)


def flaky(monkeypatch, every: int, fault: Callable[[bytes], bytes]) -> list[int]:
    """Have `fault` change what one of `every` calls of os.pread gives; how many it changed, as the only number."""
    real, calls, changed = os.pread, [0], [0]

    def pread(descriptor: int, size: int, start: int) -> bytes:
        data = real(descriptor, size, start)
        calls[0] += 1
        if calls[0] % every or not data:
            return data
        changed[0] += 1
        return fault(data)

    monkeypatch.setattr(os, "pread", pread)
    return changed


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    place = len(data) // 3
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def failed(data: bytes) -> bytes:
    raise OSError(5, "Input/output error")


def none(data: bytes) -> bytes:
    return b""


def stream_of(tiny, folder: Path) -> Stream:
    return pretraining(tiny_config(tiny, *moved(folder))).stream


@pytest.mark.parametrize("fault", [half, flipped, failed, none])
@pytest.mark.parametrize("every", [11, 10])  # not a row's number of reads, or each time it is read would be harmed
def test_a_disk_that_errs_now_and_then_changes_nothing(tiny, monkeypatch, fault, every):
    """Not one bad sample, and every bit as without."""
    expected = split(pretraining(tiny_config(tiny)).stream.batch(np.arange(SAMPLES)))
    changed = flaky(monkeypatch, every, fault)
    stream = pretraining(tiny_config(tiny)).stream
    for _ in range(2):
        batch = stream.batch(np.arange(SAMPLES))
        assert not batch.bad and split(batch) == expected
    assert changed[0] > 20, "the disk did not err"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["tokens/train/{}.safetensors", "shards/train/{}.tar"])
def test_a_file_cut_under_a_running_job_is_one_line(tiny, tmp_path, what, workers):
    """With the host in it; the loader's workers live to say it."""
    folder = copied(tiny, tmp_path)
    stream = stream_of(tiny, folder)
    numbers = [np.arange(start, start + 5) for start in range(0, SAMPLES, 5)]
    batches = load(stream, numbers, workers=workers, prefetch=1, pin=False)
    next(batches)
    names = [shard.name for shard in stream.images.manifest.shards]
    for name in names:
        os.truncate(folder / what.format(name), 0)
    with pytest.raises(ShardError, match=rf"^[^\n]*host {socket.gethostname()}[^\n]*$") as caught:
        list(batches)
    assert any(str(folder / what.format(name)) in str(caught.value) for name in names)


def test_an_index_cut_under_a_running_job_is_one_line(tiny, tmp_path):
    folder = copied(tiny, tmp_path)
    stream = stream_of(tiny, folder)
    index = stream.images.index(0)
    os.truncate(index.path, 0)
    with pytest.raises(ShardError, match=r"shard-000000\.index\.safetensors"):
        stream.batch(np.arange(SAMPLES))
    with pytest.raises(ShardError, match=r"cannot read .*index\.safetensors"):
        index.key(0)
    with pytest.raises(ShardError, match=r"cannot read .*index\.safetensors"):
        index.label.sum()


def test_a_file_that_is_replaced_by_the_same_is_opened_anew(tiny, tmp_path):
    """As when a damaged set is restored under a running job."""
    folder = copied(tiny, tmp_path)
    stream = stream_of(tiny, folder)
    expected = split(stream.batch(np.arange(SAMPLES)))
    for path in [*folder.glob("*/train/*.safetensors"), *folder.glob("*/train/*.tar")]:
        whole = path.read_bytes()
        os.truncate(path, 0)
        path.unlink()
        path.write_bytes(whole)
    assert split(stream.batch(np.arange(SAMPLES))) == expected


@pytest.mark.parametrize("column", ["label", "width", "image_xxh3", "key_hash", "flags", "mean_grey"])
def test_an_index_that_changes_after_it_was_opened_is_noticed(tiny, tmp_path, column):
    """A label that was right when the file was read through, and is another when the row is read."""
    folder = copied(tiny, tmp_path)
    images = ImageSet(folder / "shards" / "train")
    index = images.index(0)
    place = index.columns[column].start
    with open(index.path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(Damaged, match="are not what was written"):
        index.row(0)
    with pytest.raises(ShardError, match=r"is not the index that .*manifest\.json lists"):
        images.row(0, 0)


def test_what_stays_damaged_is_so(tiny, monkeypatch):
    """Read again, not believed for ever: each image that stays wrong is a bad sample, after five reads."""
    reads: list[int] = []
    real = OpenFile.read

    def read(self: OpenFile, size: int, start: int) -> bytes:
        data = real(self, size, start)
        if self.path.suffix != ".tar":
            return data
        reads.append(start)
        return flipped(data) if start == place else data

    images = pretraining(tiny_config(tiny)).stream.images
    place = images.row(0, 1).image_offset
    monkeypatch.setattr(OpenFile, "read", read)
    with pytest.raises(ShardError, match="checksum"):
        images.read(0, 1)
    assert reads == [place] * (1 + retry.READS)
    assert images.read(0, 0)


@pytest.mark.parametrize("open_", [open_index, open_token_shard, open_tensors, file_digest])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_regular_file_is_one_line_at_once(tmp_path, open_, kind):
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ShardError, match=r"x\.safetensors is no regular file"):
        open_(path)


def test_reads_are_bounded_by_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    file = OpenFile(path)
    assert file.read(4, 3) == b"3456" and file.up_to(1 << 60, 8) == b"89" and file.up_to(5, 1 << 40) == b""
    with pytest.raises(EOFError, match="it had 10 when it was opened"):
        file.read(1 << 60, 0)
    os.truncate(path, 4)
    with pytest.raises(EOFError, match="it ends at byte 4, and had 10 bytes"):
        file.read(10, 0)
    with pytest.raises(ShardError, match="has 4 bytes, and may have 3"):
        read_whole(path, 3)


def test_nothing_of_a_file_is_kept(tmp_path):
    """Neither its bytes nor, once it is forgotten, its descriptor."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": np.zeros(1 << 22, np.uint8)}, {})
    before = len(os.listdir("/proc/self/fd"))
    opened = TensorFile(path)
    assert opened.digest == file_digest(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert opened.bytes.sums is not None and len(opened.bytes.sums) * 8 < 1 << 14
    del opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_running_job_maps_no_set(tiny):
    """Where a file is mapped, a cut of it is a SIGBUS."""
    stream = pretraining(tiny_config(tiny)).stream
    stream.batch(np.arange(SAMPLES))
    assert str(tiny.folder) not in Path("/proc/self/maps").read_text()


def test_a_cut_token_file_ends_a_run_with_its_line(tiny, tmp_path):
    """The process itself: exit by exception, not by SIGBUS."""
    folder = copied(tiny, tmp_path)
    code = """if True:
        import os, sys
        from pathlib import Path
        import numpy as np
        from beitforge.shards.errors import ShardError
        from beitforge.shards.storage import retry
        from beitforge.shards.format.tokens import TokenSet
        from beitforge.shards.stream.image_set import ImageSet
        retry.PAUSES = (0.01,)
        folder = Path(sys.argv[1])
        images, tokens = ImageSet(folder / "shards/train"), TokenSet(folder / "tokens/train")
        keys = lambda: images.index(0).key_hash
        opened = tokens.shard(0, keys)
        os.truncate(opened.path, 0)
        try:
            tokens.row(0, keys, 0, 0)
        except ShardError as error:
            print(error)
            sys.exit(2)
    """
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "safetensors" in done.stdout, done.stderr


def test_what_is_read_is_named_where_it_fails_and_not_otherwise():
    named: list[str] = []

    def name() -> str:
        named.append("it")
        return "it"

    assert retry.anew(lambda: 7, named.clear, name) == 7
    assert named == []
    gone = [OSError("gone"), OSError("gone"), OSError("gone")]

    def read() -> int:
        if gone:
            raise gone.pop()
        return 7

    assert retry.anew(read, list, name) == 7
    assert named == ["it"]
