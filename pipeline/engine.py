"""DeepSpeed: start-up, configuration, and the few calls the loop needs. Must not know model, shards or stages."""

import contextlib
import datetime
import io
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import Config, ConfigError

_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_world() -> World:
    """Join the process group that the launcher's environment (deepspeed, torchrun or srun) describes; else alone.

    On a CPU it uses gloo, and none of DeepSpeed's own operators: they would be compiled at run time, and a process
    killed meanwhile leaves a lock that hangs every later one.
    """
    environment = os.environ
    if "SLURM_STEP_ID" in environment:
        for name, theirs in _SLURM.items():
            environment.setdefault(name, environment[theirs])
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        environment.setdefault(name, value)
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_free_port())
    cuda = torch.cuda.is_available()
    deepspeed = _deepspeed()
    _limit_collectives()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=_COLLECTIVE_TIMEOUT)
    local = int(environment["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        local_size = int(environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", environment["WORLD_SIZE"])))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, local_size)))
        device = torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def _deepspeed() -> Any:
    """The deepspeed module, quiet, and told not to compile its shared-memory operator."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed calls torch.distributed functions whose new names torch 2.13 advertises at every call
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\..* is deprecated")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _limit_collectives() -> None:
    """DeepSpeed's own groups ignore the timeout of init_distributed; give torch's new_group that default instead."""
    made = dist.new_group
    if getattr(made, "limited", False):
        return

    def new_group(ranks: Any = None, timeout: Any = _COLLECTIVE_TIMEOUT, *rest: Any, **named: Any) -> Any:
        return made(ranks, timeout, *rest, **named)

    new_group.limited = True  # type: ignore[attr-defined]
    dist.new_group = new_group


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        """groups: AdamW parameter groups. Raises ConfigError for what DeepSpeed refuses."""
        if setup.precision == "fp16" and world.device.type == "cpu":
            raise ConfigError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
        self.world, self.setup = world, setup
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[setup.precision]
        deepspeed = _deepspeed()
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=groups, config=deepspeed_config(setup)
        )
        if setup.compile:
            self.deepspeed.compile()

    @property
    def model(self) -> Callable:
        return self.deepspeed

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the number of accumulation steps."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> Tensor | float:
        """After the last micro batch: clip, update, clear. Returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._plain_norm()
        self.deepspeed.step()
        return self.deepspeed.get_global_grad_norm() if norm is None else norm

    def accumulate(self) -> None:
        """After a micro batch that is not the last: DeepSpeed counts it."""
        self.deepspeed.step()

    def _plain_norm(self) -> Tensor | None:
        """Without ZeRO and in fp32 DeepSpeed keeps no norm: take it from the reduced gradients."""
        if self.setup.zero_stage > 0 or self.setup.precision != "fp32":
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.stack([gradient.norm() for gradient in gradients]).norm()


def consolidated_weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    """float32 weights of one checkpoint folder, put together from every process's part; on the CPU.

    Raises ConfigError when a file of it cannot be read.
    """
    try:
        weights = _weights(folder, zero_stage)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder} is damaged ({reason}); remove it to fall back to the one before") from error
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()}


def _weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    if zero_stage == 0:
        return torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
    _deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)


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
