"""What `doctor` asks of a device: its memory and health, what a step takes of it, a dry step in real shapes.

Must not know the stages. What it needs of the stream are the shapes of a batch; their contents are made up.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beitforge.pipeline.cluster.environment import RankInfo
from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.data.pretraining import sample_draws
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.deepspeed_config import setup_from
from beitforge.pipeline.distributed.device import DTYPES, memory_bytes
from beitforge.pipeline.distributed.engine import Engine
from beitforge.pipeline.doctor.findings import OK, STOP, WARNING, Local
from beitforge.pipeline.doctor.host import nvidia_smi
from beitforge.pipeline.plan.estimate import sharding_of
from beitforge.pipeline.plan.zero_model import states
from beitforge.pipeline.training.objectives import masked_token_loss
from beitforge.pipeline.training.optim import pretraining_groups
from beitforge.shards.stream.loader import Batch

_FIELDS = "uuid,memory.free,memory.total,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.active"
_SLOWED = (
    (0x8, "hardware slowdown"),
    (0x20, "software thermal slowdown"),
    (0x40, "hardware thermal slowdown"),
    (0x80, "power brake"),
)
_MICRO_TRIED = (2, 4)  # images of which the memory of more is computed
_TURNS = 4  # of the dry step, the first of which is not timed
_CLOSE = 0.92  # share of the free memory that leaves too little to chance


def health(place: RankInfo, device: torch.device, local: Local) -> None:
    """Memory that others hold, uncorrected ECC errors and throttling of this rank's GPU, where the driver tells."""
    if device.type != "cuda":
        local.add(OK, "device", f"CPU, {torch.get_num_threads()} threads", value="CPU")
        return
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    local.add(OK, "device", f"{name}, {free >> 30} of {total >> 30} GiB free", value=name)
    if free < 0.9 * total - torch.cuda.memory_reserved(device):
        cure = "nvidia-smi names the processes that hold it: end them, or take another node"
        local.add(WARNING, "device", f"{(total - free) >> 30} of {total >> 30} GiB are taken before we begin", cure)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for row in nvidia_smi(_FIELDS):
        if row[0].removeprefix("GPU-") == uuid:
            check_driver_row(row, local)


def check_driver_row(row: list[str], local: Local) -> None:
    """Judge one row of nvidia-smi's answer to _FIELDS; what it does not support it calls [N/A]."""
    _, _, _, errors, slowed = row
    if errors.isdecimal() and int(errors):
        cure = "reset the GPU or drain the node; errors that come back mean another card"
        local.add(STOP, "device", f"{errors} uncorrected ECC errors since the driver was loaded", cure)
    if slowed.startswith("0x"):
        reasons = [name for bit, name in _SLOWED if int(slowed, 16) & bit]
        if reasons:
            cure = "see to its cooling and power (nvidia-smi -q -d PERFORMANCE), or leave the node out"
            local.add(WARNING, "device", f"the GPU is slowed: {', '.join(reasons)}", cure)


def synthetic_batch(config: Config, images: int, rank: int) -> Batch:
    """A batch of the shapes of training."""
    generator = torch.Generator().manual_seed(rank)
    samples = np.arange(images, dtype=np.int64) + rank * images
    drawn = sample_draws(config.mask, config.model, config.data.seed, samples)
    pixels = torch.randint(256, (images, 3, *config.model.input_size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(config.tokenizer.vocabulary, (images, config.model.num_patches), generator=generator)
    return Batch(
        samples=torch.from_numpy(samples),
        pixels=pixels,
        tokenizer_pixels=torch.empty(0, dtype=torch.uint8),
        tokens=tokens,
        jitters=torch.ones(images, 3),
        orders=torch.zeros(images, dtype=torch.int64),
        pivots=torch.full((images,), 117.0),
        labels=torch.zeros(images, dtype=torch.int64),
        draws={name: torch.from_numpy(value) for name, value in drawn.items()},
        bad=[],
    )


@dataclass(frozen=True)
class Cost:
    """Of a step: bytes of memory of the device and seconds forward and backward, by the images of a micro batch."""

    fixed: float
    image: float
    image_seconds: float

    def memory(self, images: int) -> float:
        return self.fixed + self.image * images


def cost(config: Config, module: nn.Module, device: torch.device, world: int) -> Cost:
    """Measured forward and backward with a few images and without DeepSpeed, and what the optimizer adds."""
    module.to(device, DTYPES[config.train.precision])
    few, more = ((images, *_tried(config, module, device, images)) for images in _MICRO_TRIED)
    module.zero_grad(set_to_none=True)
    image = max(1.0, (more[1] - few[1]) / (more[0] - few[0]))
    return Cost(_states(config, device, world), image, more[2] / more[0])


def _states(config: Config, device: torch.device, world: int) -> float:
    """Bytes of weights, gradients, optimizer and buffers by ZeRO's stage. Of a bucket in a CPU's memory only what is
    written counts, and that is the gradients."""
    sharding = sharding_of(config, world, config.train.zero_stage, 1)
    found = states(sharding)
    if device.type == "cuda":
        return found.device
    return found.device - found.buffers + min(found.buffers, sharding.number * sharding.total)


def _tried(config: Config, module: nn.Module, device: torch.device, images: int) -> tuple[float, float]:
    """Bytes kept for backward, and seconds of the second of two turns."""
    batch, kept, seconds = synthetic_batch(config, images, 0).to(device), 0.0, 0.0
    for _ in range(2):
        started, saved = time.perf_counter(), _Saved(module)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, saved.give):
            loss, _ = masked_token_loss(config, module, batch, DTYPES[config.train.precision])
        loss.backward()
        _wait(device)
        seconds = time.perf_counter() - started
        kept = float(torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else saved.bytes)
    return kept, seconds


class _Saved:
    """Counts what autograd keeps beside the weights, each piece of memory once."""

    def __init__(self, module: nn.Module):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    @staticmethod
    def give(tensor: Tensor) -> Tensor:
        return tensor


def fits(config: Config, cost: Cost, micro: int, per_process: int, free: float, local: Local) -> bool:
    """Whether a micro batch fits into the memory that is free, by what a few images take."""
    wanted = cost.memory(micro)
    what = f"a micro batch of {micro} takes about {wanted / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free for it"
    value = f"{wanted / 2**30:.1f} GiB"
    if wanted <= _CLOSE * free:
        local.add(OK, "memory", what, value=value)
        return True
    largest = int((_CLOSE * free - cost.fixed) // cost.image)
    smaller = [size for size in range(1, min(micro, max(largest, 0)) + 1) if per_process % size == 0]
    cure = (
        f"train.micro_batch={max(smaller)} fits, accumulation makes up for it; or train.activation_checkpointing=full"
    )
    if not smaller:
        cure = "more processes with train.zero_stage=3, train.offload_optimizer=true, or a smaller model"
    local.add(STOP if wanted > free else WARNING, "memory", what, cure, value=value)
    return wanted <= free


def free_memory(place: RankInfo, device: torch.device) -> float:
    """Bytes this rank may take: of its GPU; or its share of the host's, within its control group."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return min(float(lines["MemAvailable"].split()[0]) * 1024, _group_limit()) / place.local_size


def _group_limit() -> float:
    """The smallest memory limit of the control groups this process is in, less what they use."""
    least = math.inf
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, kind, name = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / kind
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kind else ("memory.max", "memory.current")
        for folder in (root / name.lstrip("/"), root):
            limit, used = (_number(folder / file) for file in files)
            least = min(least, limit - used) if limit < 2**60 else least
    return least


def _number(path: Path) -> float:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return math.inf
    return math.inf if text == "max" else float(text)


def dry_step(
    config: Config, world: World, module: nn.Module, micro: int, local: Local, at: Callable[[str], Any]
) -> tuple[float, int]:
    """Steps of the real engine on made-up batches: seconds of a whole step, and images of this rank in it.

    Every rank calls it. `compile` is left out: it takes minutes.
    """
    at("setting up DeepSpeed")
    whole = setup_from(config, world, micro)
    setup = replace(whole, global_batch=micro * world.size, accumulation=1, compile=False)
    engine = Engine(module, pretraining_groups(module, config.optimizer), setup, world)
    batch, finite = synthetic_batch(config, micro, world.rank).to(world.device), True
    times: list[tuple[float, float]] = []
    for turn in range(_TURNS):
        at(f"dry step {turn + 1} of {_TURNS}")
        started = time.perf_counter()
        loss, _ = masked_token_loss(config, engine.model, batch, engine.dtype)
        engine.backward(loss)
        _wait(world.device)
        middle = time.perf_counter()
        engine.step(1e-6)
        _wait(world.device)
        times.append((middle - started, time.perf_counter() - middle))
        finite = finite and math.isfinite(float(loss.detach()))
    forth, update = (min(part) for part in zip(*times[1:], strict=True))
    seconds = whole.accumulation * forth + update
    peak = memory_bytes(world.device)
    images = micro * whole.accumulation
    what = f"{seconds:.3f} s for {whole.global_batch} images, {whole.accumulation} × {micro} a rank"
    what += f", {images / seconds:.0f} images/s a rank; peak memory {peak / 2**30:.2f} GiB"
    local.add(OK, "step", what, value=f"{seconds:.2f} s")
    if not finite:
        cure = "set model.kernels=reference: when it helps, a kernel is at fault; else train.precision=fp32"
        local.add(STOP, "step", "the loss of a fresh model on made-up images is not finite", cure)
    return seconds, images


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cores(place: RankInfo) -> int:
    """CPU cores of this host for each of its ranks."""
    return len(os.sched_getaffinity(0)) // place.local_size
