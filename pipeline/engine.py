"""DeepSpeed: start-up, configuration, and the few calls the loop needs. Must not know model, shards or stages."""

import datetime
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.rendezvous import HostError, Place, meeting, place_of, refuse_loopback_name
from pipeline.sharding import checkpoint_bytes
from pipeline.watchdog import longest

_NO_LIMIT = datetime.timedelta(days=365)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_world(hang_seconds: float = 600.0) -> World:
    """Join the process group that the environment describes (pipeline.rendezvous); else alone.

    On a CPU it uses gloo, and none of DeepSpeed's own operators: they would be compiled at run time, and a process
    killed meanwhile leaves a lock that hangs every later one. hang_seconds (0: no limit): collectives wait as long as
    pipeline.watchdog does at most, which says more.
    """
    limit = datetime.timedelta(seconds=longest(hang_seconds)) if hang_seconds else _NO_LIMIT
    place = place_of(os.environ)
    os.environ.update(meeting(os.environ))
    cuda = torch.cuda.is_available()
    if not cuda:
        refuse_loopback_name(place, os.environ)
    deepspeed = quiet_deepspeed()
    _limit_collectives(limit)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=limit)
    device = own_device(place)
    return World(dist.get_rank(), dist.get_world_size(), device)


def own_device(place: Place) -> torch.device:
    """This process's GPU, made the current one, or the CPU with this process's share of its cores."""
    if torch.cuda.is_available():
        # SLURM may show each task its own GPU only, as number 0
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(place.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    return torch.device("cpu")


def quiet_deepspeed() -> Any:
    """The deepspeed module, quiet, and told not to compile its shared-memory operator."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed calls torch.distributed functions whose new names torch 2.13 advertises at every call
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\..* is deprecated")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _limit_collectives(limit: datetime.timedelta) -> None:
    """DeepSpeed's own groups ignore the timeout of init_distributed; give torch's new_group that default instead."""
    made = dist.new_group
    if getattr(made, "limited", False):
        return

    def new_group(ranks: Any = None, timeout: Any = limit, *rest: Any, **named: Any) -> Any:
        return made(ranks, timeout, *rest, **named)

    new_group.limited = True  # type: ignore[attr-defined]
    dist.new_group = new_group


def agree(values: list[float], world: World) -> list[float]:
    """The largest of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def sums(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_values(values: list[float], world: World) -> list[list[float]]:
    """Every rank's few numbers, in rank order."""
    mine = torch.tensor(values, dtype=torch.float64, device=world.device)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine)
    return [theirs.tolist() for theirs in everyone]


def all_rows(rows: Tensor, world: World) -> Tensor:
    """The rows [n, …] of every rank, of as many each as it has, end to end in rank order."""
    counts = [int(count) for (count,) in all_values([float(len(rows))], world)]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(everyone, padded)
    return torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)])


def gathered(item: object, world: World) -> list:
    """Every rank's small picklable object, in rank order; only between processes of one run."""
    items: list = [None] * world.size
    dist.all_gather_object(items, item)
    return items


def from_first(item: object, world: World) -> Any:
    """Rank 0's object, on every rank."""
    if world.size == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0, device=world.device)
    return items[0]


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def leave() -> None:
    """End the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What DeepSpeed is configured from."""

    global_batch: int
    micro_batch: int
    accumulation: int
    precision: str
    zero_stage: int
    offload_optimizer: bool
    compile: bool
    clip_norm: float
    beta1: float
    beta2: float
    epsilon: float
    overrides: dict


def deepspeed_config(setup: Setup) -> dict:
    """DeepSpeed's own configuration. `setup.overrides` (the YAML's deepspeed section) wins, key by key."""
    derived: dict[str, Any] = {
        "train_batch_size": setup.global_batch,
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": setup.clip_norm,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": setup.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": [setup.beta1, setup.beta2],
                "eps": setup.epsilon,
                "torch_adam": True,  # torch's own fused AdamW; DeepSpeed's would be compiled at run time
            },
        },
    }
    if setup.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if setup.precision != "fp32":
        derived[setup.precision] = {"enabled": True}
    return _merged(derived, setup.overrides)


def _merged(base: dict, over: dict) -> dict:
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if nested else value
    return result


class Engine:
    """A model under DeepSpeed. `model` is what objectives call; parameters live wherever ZeRO put them."""

    def __init__(self, module: nn.Module, groups: list[dict], setup: Setup, world: World):
        """groups: AdamW parameter groups. Raises HostError for fp16 without a GPU."""
        if setup.precision == "fp16" and world.device.type == "cpu":
            host = socket.gethostname()
            raise HostError(f"train.precision fp16 needs a GPU, and {host} shows none; on a CPU use bf16 or fp32")
        self.world, self.setup = world, setup
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[setup.precision]
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        deepspeed = quiet_deepspeed()
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=groups, config=deepspeed_config(setup)
        )
        for state in getattr(self.optimizer, "optimizer", self.optimizer).state.values():
            state["step"].zero_()  # DeepSpeed's optimizer without ZeRO warms up with a step that AdamW counts
        from pipeline.writer import Writer

        self.writer = self.deepspeed.checkpoint_engine = Writer()
        if setup.compile:
            self.deepspeed.compile()

    @property
    def model(self) -> Callable:
        return self.deepspeed

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on disk."""
        numbers = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.module.parameters())
        return checkpoint_bytes(numbers, self.setup.zero_stage, self.dtype.itemsize)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the number of accumulation steps.

        A loss that is not finite is given gradients that are not, so that `step` leaves the update out on every rank.
        """
        finite = torch.isfinite(loss.detach())
        self.deepspeed.backward(loss * torch.where(finite, 1.0, math.nan))

    def step(self, learning_rate: float) -> tuple[Tensor | float, bool]:
        """After the last micro batch: clip, update, clear; a group's rate is learning_rate times its `lr_scale`, if it
        has one. Returns the gradient norm before clipping, and whether the update was made: not where the norm, which
        is over all ranks, is not finite. Then nothing has changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        norm = self._plain_norm()
        if norm is None:
            self.deepspeed.step()
            return self.deepspeed.get_global_grad_norm(), not bool(getattr(self.optimizer, "overflow", False))
        made = bool(torch.isfinite(norm))
        if made:
            self.deepspeed.step()
        else:  # what DeepSpeed does with ZeRO and in half precision
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
            self.deepspeed.global_steps += 1
            self.deepspeed.skipped_steps += 1
        return norm, made

    @property
    def scales_loss(self) -> bool:
        """Whether gradients beyond the range are part of the search for a loss scale (fp16), and no fault."""
        return self.dtype == torch.float16

    def accumulate(self) -> None:
        """After a micro batch that is not the last: DeepSpeed counts it."""
        self.deepspeed.step()

    def _plain_norm(self) -> Tensor | None:
        """Without ZeRO and in fp32 DeepSpeed keeps no norm: take it from the reduced gradients."""
        if self.setup.zero_stage > 0 or self.setup.precision != "fp32":
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.stack([gradient.norm() for gradient in gradients]).norm()


def setup_from(config: Config, world: World, micro: int) -> Setup:
    """The pretraining run's setup; `micro` from config.micro_batch."""
    train, optimizer = config.train, config.optimizer
    return Setup(
        global_batch=train.global_batch,
        micro_batch=micro,
        accumulation=train.global_batch // (micro * world.size),
        precision=train.precision,
        zero_stage=train.zero_stage,
        offload_optimizer=train.offload_optimizer,
        compile=train.compile,
        clip_norm=optimizer.clip_norm,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        overrides=config.deepspeed,
    )
