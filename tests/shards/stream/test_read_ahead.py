"""Reads made ahead by threads: the same batches, bad samples and errors; on where reads are slow, and only there."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from beitforge.pipeline.data.pretraining import pretraining
from beitforge.shards.errors import ShardError
from beitforge.shards.format.views import ViewPolicy
from beitforge.shards.storage import retry
from beitforge.shards.storage.reading import Turns
from beitforge.shards.stream import read_ahead
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import load
from beitforge.shards.stream.read_ahead import MOST_THREADS, THREAD, ReadAhead, Rule
from beitforge.shards.stream.view_batches import Piece, ViewCutter, ViewLoader
from tests.shards.stream.test_stream import copied, damage, moved, split, tiny_config

SAMPLES, BATCH = 50, 10
NUMBERS = [np.arange(start, start + BATCH) for start in range(0, 2 * SAMPLES, BATCH)]
BY_THREADS = multiprocessing.get_context("fork").Value("q", 0)


@pytest.fixture(params=["slow", "fast"])
def disk(request, monkeypatch):
    """What the rule is told of every read, whatever it took."""
    given = given_waits(monkeypatch, 1.0 if request.param == "slow" else 0.0)
    yield request.param
    assert (given.value > 0) == (request.param == "slow"), "threads read where reads are slow, and nowhere else"


def given_waits(monkeypatch, seconds: float):
    """Have every read take that long, as the rule sees it; how many were made by threads."""
    BY_THREADS.value = 0

    def timed(read, place):
        with BY_THREADS.get_lock():
            BY_THREADS.value += threading.current_thread() is not threading.main_thread()
        return read(place), seconds

    monkeypatch.setattr(read_ahead, "_timed", timed)
    return BY_THREADS


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores: meant here
def test_the_same_batches_and_bad_samples(tiny, tmp_path, workers, disk):
    folder = copied(tiny, tmp_path)
    keys = {damage(folder, shard=1, row=3), damage(folder, shard=0, row=2)}
    stream = pretraining(tiny_config(tiny, *moved(folder))).stream
    expected = [stream.batch(numbers) for numbers in NUMBERS]
    found = list(load(stream, NUMBERS, workers=workers, prefetch=2, pin=False))
    assert [split(batch) for batch in found] == [split(batch) for batch in expected]
    assert [batch.bad for batch in found] == [batch.bad for batch in expected]
    assert {bad.key for batch in found for bad in batch.bad} == keys


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_that_of_its_batch(tiny, tmp_path, workers, disk, monkeypatch):
    """In one line, when its batch is asked for and no sooner."""
    monkeypatch.setattr(retry, "PAUSES", (0.001,) * 4)
    folder = copied(tiny, tmp_path)
    stream = pretraining(tiny_config(tiny, *moved(folder))).stream
    _, shards, _ = stream.places.locate(np.arange(SAMPLES))
    last = int(np.argmin([np.flatnonzero(shards == shard)[0] for shard in (0, 1)]))  # read first of the two
    numbers = [np.flatnonzero(shards != last)[:2], np.flatnonzero(shards == last)[:2]]
    name = stream.images.manifest.shards[last].name
    (folder / "shards" / "train" / f"{name}.tar").unlink()
    batches = load(stream, numbers, workers=workers, prefetch=2, pin=False)
    assert next(batches).samples.tolist() == numbers[0].tolist()
    with pytest.raises(ShardError, match=rf"^host .* cannot read {name}[^\n]*$"):
        next(batches)


def threads_since(before: list[threading.Thread]) -> int:
    """How many read ahead that did not then: those of another test may be ending."""
    return sum(thread.name == THREAD and thread not in before for thread in threading.enumerate())


def readers(monkeypatch, seconds: float, sizes: int = 8):
    """A ReadAhead over batches of `sizes` numbers, and what it read so far."""
    given_waits(monkeypatch, seconds)
    read: list[int] = []

    def one(place: int) -> int:
        read.append(place)
        if place == 20:
            raise ShardError("20 is bad")
        return -place

    return ReadAhead(lambda number: range(number * sizes, (number + 1) * sizes), one), read


def test_one_batch_is_read_ahead_and_no_more(monkeypatch):
    ahead, read = readers(monkeypatch, 1.0)
    before = threading.enumerate()
    places, found = ahead.batch(0, 1)
    assert list(places) == list(range(8)) and found == [-place for place in range(8)]
    assert ahead.rule.threads == MOST_THREADS == threads_since(before)
    ahead.batch(1, None)
    assert sorted(read) == list(range(16))
    for number in (2, 2):  # again where it is asked for again
        with pytest.raises(ShardError, match="20 is bad"):
            ahead.batch(number, 3)
    assert ahead.batch(3, None)[1] == [-place for place in range(24, 32)]
    ahead.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(20)
    assert threads_since(before) == 0


def test_another_batch_than_was_said_is_read_all_the_same(monkeypatch):
    ahead, _ = readers(monkeypatch, 1.0)
    ahead.batch(0, 1)
    assert ahead.batch(5, None)[1] == [-place for place in range(40, 48)]
    ahead.close()


def test_without_waiting_no_thread_is_made(monkeypatch):
    ahead, read = readers(monkeypatch, 0.0)
    before = threading.enumerate()
    for number in (0, 1, 3):
        ahead.batch(number, number + 1)
    assert threads_since(before) == 0 and len(read) == 24


def test_threads_are_as_many_as_are_waited_for():
    rule = Rule()
    rule.read_here(0.0001, 0.001)
    assert rule.threads == 0
    rule.read_here(0.005, 0.001)
    assert rule.threads == 8
    rule.read_ahead(0.006, 0.0005, 0.001)
    assert rule.threads == 16, "doubled where they were waited for"
    rule.read_ahead(0.006, 0.0, 0.001)
    assert rule.threads == 16
    for _ in range(9):
        rule.read_ahead(0.1, 0.1, 0.001)
    assert rule.threads == MOST_THREADS and not rule.tries, "what is surely slow is not tried without threads"


def batches_to_a_try(rule: Rule) -> int:
    for count in range(1, 5000):
        rule.read_ahead(0.0005, 0.0, 0.001)
        if rule.tries:
            return count
    raise AssertionError("never tried")


def test_threads_end_where_reads_have_become_fast_and_are_tried_ever_seldomer():
    rule = Rule()
    rule.read_here(0.005, 0.001)
    gaps = []
    for _ in range(9):
        gaps.append(batches_to_a_try(rule))
        rule.read_here(0.0001, 0.001)  # neither slow nor fast: as it was
        assert rule.threads == 8
    assert gaps == [16, 32, 64, 128, 256, 512, 1024, 1024, 1024]
    batches_to_a_try(rule)
    rule.read_here(0.00001, 0.001)
    assert rule.threads == 0
    rule.read_here(0.0001, 0.001)
    assert rule.threads == 0, "what ended threads does not begin them"


def test_a_shard_is_opened_once_for_many_threads(tiny, monkeypatch):
    images = ImageSet(tiny.folder / "shards" / "train")
    opened: list[int] = []
    real, together = ImageSet._open_shard, threading.Barrier(8)

    def opening(self: ImageSet, shard: int):
        opened.append(shard)
        return real(self, shard)

    def read(number: int) -> bytes:
        together.wait(20)
        return images.read(0, number)

    monkeypatch.setattr(ImageSet, "_open_shard", opening)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert opened == [0] and found == [images.read(0, number) for number in range(8)]


def test_a_fork_waits_for_no_thread_of_its_parent():
    turns = Turns()
    context = multiprocessing.get_context("fork")
    with turns.of(3):
        child = context.Process(target=lambda: None if turns.of(3).acquire(timeout=20) else exit(1))
        child.start()
        child.join()
    assert child.exitcode == 0


def test_a_forks_batches_are_read_by_threads_of_its_own(monkeypatch):
    ahead, _ = readers(monkeypatch, 1.0)
    ahead.batch(0, 1)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    child = context.Process(target=lambda: [found.put(ahead.batch(number, number + 1)[1]) for number in (0, 1)])
    child.start()
    assert [found.get(timeout=60) for _ in range(2)] == [[-place for place in range(n, n + 8)] for n in (0, 8)]
    child.join()
    ahead.close()


def test_the_cuts_of_tokenize_are_the_same(tiny, tmp_path, disk):
    """Bad images, too; and no piece but those asked for."""
    folder = copied(tiny, tmp_path)
    key = damage(folder, shard=1, row=3)
    images = ImageSet(folder / "shards" / "train")
    pieces = [
        Piece(shard, first, min(first + 10, entry.samples))
        for shard, entry in enumerate(images.manifest.shards)
        for first in range(0, entry.samples, 10)
    ]
    how = {"policy": ViewPolicy(), "num_views": 2, "size": (8, 8), "resample": "bicubic"}
    expected = [ViewCutter(images=images, **how).cut(piece) for piece in pieces]  # each with threads of its own at most
    with ViewLoader(ViewCutter(images=images, **how), workers=1, prefetch=2) as cutter:
        found = list(cutter.load(pieces))
    for one, other in zip(found, expected, strict=True):
        assert one.piece == other.piece and torch.equal(one.pixels, other.pixels) and one.reasons == other.reasons
        assert np.array_equal(one.bad, other.bad) and np.array_equal(one.views.levels, other.views.levels)
    assert [named for batch in found for named, _ in batch.reasons.values()] == [key]
