"""Pixels come out of the workers' memory uncopied, and stay their reader's for as long as anything holds them."""

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.queues import SimpleQueue

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

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


STREAM = """
import multiprocessing, sys, threading, time
import beitforge

def batches():
    images = beitforge.open_images(sys.argv[1])
    return beitforge.stream(images, size=32, batch_size=4, workers=2)

def child(how):
    global kept
    kept = batches()
    for number, batch in enumerate(kept):
        if number == 2 and how == "raises":
            raise RuntimeError("the user's own")
        if number == 2:
            break

def read():
    for batch in batches():
        ready.set()

if __name__ == "__main__":
    ready = threading.Event()
    if sys.argv[2] == "thread":
        threading.Thread(target=read, daemon=True).start()
        ready.wait()
    else:
        process = multiprocessing.get_context(sys.argv[3]).Process(target=child, args=(sys.argv[2],))
        process.start()
        process.join()
        sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("how", ["raises fork", "ends fork", "raises spawn", "thread"])
def test_a_process_ends_whatever_it_leaves_of_a_stream(tiny, tmp_path, how):
    """Its workers end with it: one that multiprocessing started, and one whose daemon thread still reads."""
    (tmp_path / "script.py").write_text(STREAM)
    command = [sys.executable, "script.py", str(tiny.folder / "shards" / "train"), *how.split()]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            _, errors = started.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == how.startswith("raises"), errors
    assert "Exception ignored" not in errors and ("own" in errors) == how.startswith("raises"), errors


def test_a_signal_from_elsewhere_ends_no_worker(tiny):
    """A scheduler's goes to every process; the training process still needs batches to finish its step."""
    stream = pretraining(tiny_config(tiny)).stream
    batches = load(stream, NUMBERS, workers=2, prefetch=1, pin=False)
    found = [next(batches).samples.tolist()]
    for worker in multiprocessing.active_children():
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    found += [batch.samples.tolist() for batch in batches]
    assert found == [numbers.tolist() for numbers in NUMBERS]


def _tell(told: SimpleQueue, go: SimpleQueue, pixels: torch.Tensor) -> None:
    go.get()
    told.put(pixels.numpy().tobytes())


class _Held:
    """A data set of its user's, made of a batch that is held."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> bytes:
        return self.pixels.numpy().tobytes()


def test_a_fork_keeps_what_it_sees_of_a_batch(tiny):
    """Though its parent lets the batch go, and workers make many more; further ones are lent or copied as before."""
    stream = pretraining(tiny_config(tiny)).stream
    expected = [stream.batch(numbers).pixels for numbers in NUMBERS]
    context = multiprocessing.get_context("fork")
    told, go, forked = context.SimpleQueue(), context.SimpleQueue(), []
    loaders = []
    for number, batch in enumerate(load(stream, NUMBERS, workers=2, prefetch=1, pin=False)):
        assert torch.equal(batch.pixels, expected[number])
        if number < 2:
            forked.append(context.Process(target=_tell, args=(told, go, batch.pixels)))
            forked[-1].start()
        if number == 4:
            loaders.append(iter(DataLoader(_Held(batch.pixels), batch_size=None, num_workers=1)))
        del batch
    seen = set()
    for _ in forked:
        go.put(None)
        seen.add(told.get())
    for process in forked:
        process.join()
    assert seen == {pixels.numpy().tobytes() for pixels in expected[:2]}
    assert next(loaders[0]) == expected[4].numpy().tobytes()


def test_a_ring_gives_what_a_fork_sees():
    ring = loader._Ring(1, 2, 3, ((2, 2), (0, 0)))
    slots = [slot for _, slot in ring.numbered(3)]
    first = ring.received(slots[0], 3, False)
    loader._give_lent()
    del first
    assert ring.free == [] and ring.lent == {slots[0]}, "never written to again"
    second = ring.received(slots[1], 3, False)
    del second
    assert ring.free == [slots[1]] and ring.lent == {slots[0]}


@pytest.mark.parametrize("second", [(0, 0), (2, 3)])
def test_a_batch_is_pickled_once(second):
    """Of memory that both kinds of pixels lie in, each tensor carries its own."""
    ring = loader._Ring(1, 1, 64, ((64, 64), second))
    pixels = ring.received(ring.free.pop(), 64, False)
    assert len(pickle.dumps(pixels)) < 64**3 + 64 * second[0] * second[1] + 4096
