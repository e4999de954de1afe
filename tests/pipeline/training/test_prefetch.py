"""Batches reach their device in order, each once, and on a GPU before they are asked for."""

import time
from collections.abc import Iterator

import pytest
import torch

from beitforge.pipeline.training.prefetch import DevicePrefetcher
from beitforge.shards.stream.loader import Batch


def batch(number: int, pin: bool) -> Batch:
    full = torch.full((2, 3, 256, 256), number, dtype=torch.uint8)
    small = torch.tensor([number, number + 1])
    tensors = [full, full, small, small.float(), small, small.float(), small]
    tensors = [tensor.pin_memory() if pin else tensor for tensor in tensors]
    return Batch(small, *tensors, {"mask": small > number}, [])


def batches(count: int, taken: list[int], pin: bool = False) -> Iterator[Batch]:
    for number in range(count):
        taken.append(number)
        yield batch(number, pin)


def test_on_a_cpu_batches_come_when_they_are_asked_for():
    taken: list[int] = []
    feed = DevicePrefetcher(batches(3, taken), torch.device("cpu"))
    for number in range(3):
        came, moved = feed.next()
        feed.prefetch()
        assert int(came.samples[0]) == int(moved.samples[0]) == number
        assert taken == list(range(number + 1))


def test_waiting_is_counted():
    def slow() -> Iterator[Batch]:
        time.sleep(0.05)
        yield batch(0, False)

    feed = DevicePrefetcher(slow(), torch.device("cpu"))
    feed.next()
    assert feed.waiting.read() >= 0.05
    assert feed.waiting.read() == 0


def test_the_stream_must_have_a_batch():
    with pytest.raises(AssertionError, match="a batch for every step"):
        DevicePrefetcher(iter(()), torch.device("cpu")).next()


def test_every_tensor_of_a_batch_is_known():
    """What is not known would not be kept from being overwritten while a GPU reads it."""
    made = batch(0, False)
    tensors = made.tensors()
    assert len(tensors) == sum(torch.is_tensor(value) for value in made) + len(made.draws)
    assert any(tensor is made.draws["mask"] for tensor in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_next_batch_is_on_its_way():
    """Right values under a busy compute stream, and the last prepare asks for nothing that is not there."""
    taken: list[int] = []
    feed, device = DevicePrefetcher(batches(20, taken, pin=True), torch.device("cuda")), torch.device("cuda")
    busy, sums = torch.randn(2048, 2048, device=device), []
    for number in range(20):
        _, moved = feed.next()
        for _ in range(10):
            busy = (busy @ busy).tanh()
        sums.append(moved.pixels.float().mean() + busy.sum() * 0)
        feed.prefetch()
        assert taken == list(range(min(20, number + 2)))
        assert moved.draws["mask"].device.type == "cuda"
    assert torch.stack(sums).tolist() == pytest.approx(list(range(20)))
