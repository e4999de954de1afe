"""Pixels come out of the workers' memory uncopied, and stay their reader's for as long as anything holds them."""

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from beitforge.pipeline.data.pretraining import pretraining
from beitforge.shards.stream import loader
from beitforge.shards.stream.loader import load
from tests.shards.stream.test_stream import tiny_config

NUMBERS = [np.arange(start, start + 5) for start in range(0, 60, 5)]


@pytest.fixture
def rings(monkeypatch) -> list[mmap.mmap]:
    """The memory of the rings that were made."""
    made: list[mmap.mmap] = []
    real = mmap.mmap

    def recorded(number: int, size: int) -> mmap.mmap:
        made.append(real(number, size))
        return made[-1]

    monkeypatch.setattr(loader.mmap, "mmap", recorded)
    return made


def lies_in(tensor: torch.Tensor, memory: mmap.mmap) -> bool:
    start = np.frombuffer(memory, np.uint8).ctypes.data
    return start <= tensor.data_ptr() < start + len(memory)


@pytest.mark.parametrize("keeps", ["none", "one", "a part of each", "all"])
def test_batches_are_lent_and_stay_as_they_are(tiny, rings, keeps):
    stream = pretraining(tiny_config(tiny)).stream
    expected = [stream.batch(numbers).pixels for numbers in NUMBERS]
    kept: list[tuple[int, torch.Tensor]] = []
    uncopied = 0
    for number, batch in enumerate(load(stream, NUMBERS, workers=2, prefetch=2, pin=False)):
        assert torch.equal(batch.pixels, expected[number])
        uncopied += lies_in(batch.pixels, rings[0])
        if keeps == "one" and number == 1:
            kept.append((number, batch.pixels))
        elif keeps == "a part of each":
            kept.append((number, batch.pixels[2:, 1]))
        elif keeps == "all":
            kept.append((number, batch.pixels))
        del batch
        for earlier, pixels in kept:
            assert torch.equal(pixels, expected[earlier] if pixels.dim() == 4 else expected[earlier][2:, 1])
    lent = loader._LENDS
    assert uncopied == (lent if keeps in ("all", "a part of each") else len(NUMBERS))


def test_what_is_let_go_is_lent_again():
    ring = loader._Ring(1, 2, 3, ((2, 2), (0, 0)))
    taken = [slot for _, slot in ring.numbered(3)]
    assert sorted(taken) == [0, 1, 2] and not ring.free
    ring.places(taken[0], 3)[0].fill_(7)
    first = ring.received(taken[0], 3, False)
    part = first[0].numpy()[1:, 0]
    del first
    assert not ring.free and ring.lent == {taken[0]}, "a part of it is still held"
    assert part.tolist() == [[7, 7], [7, 7]]
    others = [ring.received(slot, 3, False)[0] for slot in taken[1:]]
    assert ring.free == [taken[2]], "no more are lent than two: the third is a copy"
    del part, others
    assert sorted(ring.free) == [0, 1, 2] and not ring.lent


def test_a_worker_ends_with_a_killed_parent(tiny, monkeypatch):
    """Also one that has more to say than a pipe holds, to nobody."""
    monkeypatch.setattr(loader, "_WATCH_SECONDS", 0.1)
    stream = pretraining(tiny_config(tiny)).stream
    large = dataclasses.replace(stream, draw=lambda samples: {"much": np.zeros((len(samples), 1 << 16), np.uint8)})
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)

    def run() -> None:
        batches = load(large, NUMBERS, workers=1, prefetch=4, pin=False)
        next(batches)
        tell.send(multiprocessing.active_children()[0].pid)
        signal.pause()

    parent = context.Process(target=run)
    parent.start()
    assert told.poll(60)
    worker = psutil.Process(told.recv())
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    ends = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < ends, "the worker lives on"
            time.sleep(0.1)
