"""This process among all, and what ranks tell each other. The names are those of torch.distributed."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def device_values(values: list[float], world: World) -> Tensor:
    """Few numbers f64 [n] on the device, copied to it without waiting for its work."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor


def all_max(values: list[float], world: World) -> list[float]:
    """The largest of each value over all ranks."""
    tensor = device_values(values, world)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_gather_values(values: list[float], world: World) -> list[list[float]]:
    """Every rank's few numbers, in rank order; read from the device at once, however many ranks there are."""
    mine = device_values(values, world)
    everyone = mine.new_empty(world.size * len(values))
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.view(world.size, -1).tolist()


def all_gather_rows(rows: Tensor, world: World) -> Tensor:
    """The rows [n, …] of every rank, of as many each as it has, end to end in rank order."""
    counts = [int(count) for (count,) in all_gather_values([float(len(rows))], world)]
    most = max(counts)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = rows.new_empty((world.size * most, *rows.shape[1:]))
    dist.all_gather_into_tensor(everyone, padded)
    return torch.cat([everyone[rank * most : rank * most + count] for rank, count in enumerate(counts)])


def all_gather_text(text: str, world: World) -> str:
    """Every rank's text end to end, in rank order: bytes, where objects of thousands of ranks would be unpickled."""
    rows = torch.tensor(list(text.encode()), dtype=torch.uint8, device=world.device)
    return bytes(all_gather_rows(rows, world).tolist()).decode()


def all_gather_objects(item: object, world: World) -> list:
    """Every rank's small picklable object, in rank order; only between processes of one run."""
    items: list = [None] * world.size
    dist.all_gather_object(items, item)
    return items


def all_gather_lines(line: str, world: World) -> list[str]:
    """The lines of the ranks that have one, in rank order. Mostly none has: that costs one number, where objects of
    thousands of ranks take a good part of a second."""
    if not all_max([float(bool(line))], world)[0]:
        return []
    return [said for said in all_gather_objects(line, world) if said]


def broadcast_object(item: object, world: World) -> Any:
    """Rank 0's object, on every rank."""
    if world.size == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0, device=world.device)
    return items[0]


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()
