"""A node's cache: whole entries, within its size, shared by everybody, and nobody else's files."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from beitforge.shards.errors import ShardError
from beitforge.shards.storage.cache import Cache

ONE, OTHER = "0" * 16, "1" * 16


def part(owner: str, number: int) -> str:
    return f"{owner}/a.4x{number:06d}.part"


def on_disk(cache: Cache) -> int:
    return sum(path.stat().st_size for owner in (ONE, OTHER) for path in (cache.folder / owner).glob("*"))


def names(cache: Cache) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for owner in (ONE, OTHER) for path in (cache.folder / owner).glob("*")}


def fetched(size: int):
    return lambda: b"x" * size


def in_turn(entries: list[str]) -> np.ndarray:
    """Part n is used at n."""
    return np.array([float(entry.split("x")[1][:6]) for entry in entries])


def test_what_is_used_last_goes_first(tmp_path):
    cache = Cache(tmp_path, 1000)
    for number in (5, 1, 3, 2):
        assert cache.keep_part(part(ONE, number), 240, fetched(240), in_turn, before=0)
    assert cache.keep_part(part(ONE, 4), 240, fetched(240), in_turn, before=4)
    assert names(cache) == {part(ONE, number) for number in (1, 2, 3, 4)}


def test_what_is_used_sooner_makes_no_room(tmp_path):
    cache = Cache(tmp_path, 1000)
    for number in (1, 2, 3, 4):
        cache.keep_part(part(ONE, number), 240, fetched(240), in_turn, before=0)
    assert not cache.keep_part(part(ONE, 9), 240, lambda: pytest.fail("fetched"), in_turn, before=9)
    assert names(cache) == {part(ONE, number) for number in (1, 2, 3, 4)}


def test_other_sets_parts_go_before_our_own(tmp_path):
    cache = Cache(tmp_path, 1000)
    for number in (1, 2):
        cache.keep_part(part(OTHER, number), 240, fetched(240), in_turn, before=0)
        cache.keep_part(part(ONE, number), 240, fetched(240), in_turn, before=0)
    assert cache.keep_part(part(ONE, 3), 400, fetched(400), in_turn, before=0)
    assert {name for name in names(cache) if name.startswith(ONE)} == {part(ONE, number) for number in (1, 2, 3)}


def test_who_reads_in_no_order_takes_room_of_his_own_set_alone(tmp_path):
    """An evaluation throws out neither what training reads nor anybody's index."""
    cache = Cache(tmp_path, 1000)
    cache.keep_whole(f"{ONE}/a.index.safetensors", fetched(100))
    for number in (1, 2, 3):
        cache.keep_part(part(ONE, number), 280, fetched(280), in_turn, before=0)
    before = names(cache)
    assert not cache.keep_part(part(OTHER, 1), 200, lambda: pytest.fail("fetched"))
    assert names(cache) == before


def test_whole_files_go_after_all_parts(tmp_path):
    cache = Cache(tmp_path, 1000)
    cache.keep_whole(f"{ONE}/a.index.safetensors", fetched(300))
    for number in (1, 2, 3):
        cache.keep_part(part(ONE, number), 200, fetched(200), in_turn, before=0)
    cache.keep_whole(f"{ONE}/b.index.safetensors", fetched(300), in_turn)
    assert {f"{ONE}/a.index.safetensors", f"{ONE}/b.index.safetensors"} <= names(cache)
    os.utime(cache.path(f"{ONE}/a.index.safetensors"), (1, 1))
    cache.keep_whole(f"{ONE}/c.index.safetensors", fetched(600), in_turn)
    assert names(cache) == {f"{ONE}/b.index.safetensors", f"{ONE}/c.index.safetensors"}
    with pytest.raises(ShardError, match=r"has 1001 bytes, .* may take 1000 in all: raise data.cache_gb"):
        cache.keep_whole(f"{ONE}/d.index.safetensors", fetched(1001), in_turn)


def test_nobody_elses_files_are_touched(tmp_path):
    """The folder may hold anything besides."""
    (tmp_path / "photos" / "2019").mkdir(parents=True)
    (tmp_path / ONE / "folder.part").mkdir(parents=True)
    for path in (tmp_path / "wedding.jpg", tmp_path / "photos" / "cat.jpg", tmp_path / "photos" / "2019" / "dog.jpg"):
        path.write_bytes(bytes(900))
    cache = Cache(tmp_path, 1000)
    for number in range(20):
        assert cache.keep_part(part(ONE, number), 300, fetched(300), in_turn, before=-1)
    cache.keep_whole(f"{ONE}/i", fetched(950))
    assert len(list(tmp_path.rglob("*.jpg"))) == 3
    assert on_disk(cache) - (tmp_path / ONE / "folder.part").stat().st_size <= 1000


def keep_many(folder: Path, seed: int) -> None:
    cache, numbers = Cache(folder, 10_000), np.random.default_rng(seed)

    def one(number: int) -> None:
        def fetch() -> bytes:
            if number % 7 == 0:
                raise ShardError("the store fails")
            assert cache.folder.exists()
            return bytes(600)

        try:
            cache.keep_part(part(ONE, number), 600, fetch, in_turn, before=float(number))
        except ShardError:
            if number % 3 == 0:
                cache.drop(part(ONE, number - 1))

    threads = [threading.Thread(target=lambda: [one(int(n)) for n in numbers.integers(0, 60, 60)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_many_at_once_keep_the_count(tmp_path):
    """Four threads of three processes, with failing fetches and drops: the count is what is on the disk, at the end and
    never more than the limit."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=keep_many, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    cache, most = Cache(tmp_path, 10_000), 0
    while any(process.is_alive() for process in processes):
        with cache._locked("usage"):
            most = max(most, on_disk(cache))
            assert on_disk(cache) == cache._used()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 5_000 < most <= 10_000
    assert on_disk(cache) == cache._used()


def test_each_entry_is_fetched_once(tmp_path):
    """By whoever comes first; the others wait for it."""
    cache, calls = Cache(tmp_path, 10_000), []

    def fetch() -> bytes:
        calls.append(1)
        return bytes(100)

    threads = [threading.Thread(target=lambda: cache.keep_part(part(ONE, 1), 100, fetch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_disk_with_less_room_than_the_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    assert Cache(tmp_path, 10**9).limit == 950
    assert "less than data.cache_gb" in caplog.text


@pytest.mark.parametrize("what", ["file", "full"])
def test_a_folder_that_fails_is_one_line(tmp_path, monkeypatch, what):
    if what == "file":
        (tmp_path / "cache").write_text("not a folder")
        with pytest.raises(ShardError, match=r"cache folder .*cache cannot be used .*: set data.cache to another"):
            Cache(tmp_path / "cache", 1000)
        return
    cache = Cache(tmp_path / "cache", 1000)

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ShardError, match=r"No space left.*: lower data.cache_gb"):
        cache.keep_part(part(ONE, 1), 100, fetched(100))
    assert on_disk(cache) == cache._used() == 0


def test_a_disk_that_fails_to_read_is_passed_by(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 1000)
    cache.keep_part(part(ONE, 1), 100, fetched(100))
    assert cache.read(part(ONE, 1), 90, 50) == b"x" * 10

    def broken(*_) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert cache.read(part(ONE, 1), 0, 10) is None


def killed_while_fetching(cache: Cache, number: int, size: int) -> None:
    """Fork a process that fetches a part, and kill it once its room is taken."""
    read, write = os.pipe()
    child = os.fork()
    if not child:

        def hang() -> bytes:
            os.write(write, b"x")
            time.sleep(60)
            return b""

        try:
            cache.keep_part(part(ONE, number), size, hang)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("opened", ["again", "before"])
def test_what_killed_fetchers_leave_takes_no_room(tmp_path, opened):
    """36 of them leave more than the cache holds; whoever opens it, or needs the room, has all of it."""
    cache = Cache(tmp_path, 2_000_000)
    for number in range(36):
        killed_while_fetching(cache, number, 190_000)
    left = on_disk(cache)
    assert left > 1_000_000
    if opened == "again":
        cache = Cache(tmp_path, 2_000_000)
        assert on_disk(cache) == cache._used() == 0
    for number in range(10):
        assert cache.keep_part(part(OTHER, number), 190_000, fetched(190_000), in_turn, before=0)
    assert names(cache) == {part(OTHER, number) for number in range(10)}


def test_what_is_being_fetched_is_not_swept(tmp_path):
    """By whoever opens the cache meanwhile, in this process or another, a hundred times."""
    cache, began, may_end = Cache(tmp_path, 10_000), threading.Event(), threading.Event()

    def fetch() -> bytes:
        began.set()
        assert may_end.wait(60)
        return b"y" * 600

    kept: list[bool] = []
    thread = threading.Thread(target=lambda: kept.append(cache.keep_part(part(ONE, 1), 600, fetch)))
    thread.start()
    assert began.wait(60)
    for _ in range(100):
        assert Cache(tmp_path, 10_000)._used() == 600
    child = os.fork()
    if not child:
        os._exit(0 if Cache(tmp_path, 10_000)._used() == 600 else 1)
    assert os.waitpid(child, 0)[1] == 0
    may_end.set()
    thread.join()
    assert kept == [True] and cache.read(part(ONE, 1), 0, 600) == b"y" * 600


def test_a_partial_file_of_no_kind(tmp_path):
    """A folder, a link or a pipe that is called like one is let be."""
    cache = Cache(tmp_path, 1000)
    cache.keep_part(part(ONE, 1), 100, fetched(100))
    inside = tmp_path / ONE
    (inside / "a.part.partial-00000000").mkdir()
    (inside / "b.part.partial-00000000").symlink_to("nowhere")
    os.mkfifo(inside / "c.part.partial-00000000")
    assert Cache(tmp_path, 1000)._used() == 100
    assert len(list(inside.iterdir())) == 4
