"""Joining and leaving the process group, and DeepSpeed made quiet. Must not know model or shards."""

import contextlib
import datetime
import io
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from beitforge.pipeline.cluster.compiled_code import keep_compiled_code_private
from beitforge.pipeline.cluster.environment import rank_info, refuse_loopback_name, rendezvous_variables
from beitforge.pipeline.cluster.watchdog import longest
from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.device import own_device
from beitforge.pipeline.distributed.nvme_offload import remove_own_folders

_NO_LIMIT = datetime.timedelta(days=365)


def start_world(hang_seconds: float = 600.0) -> World:
    """Join the process group that the environment describes (pipeline.cluster.environment); else alone.

    On a CPU it uses gloo, and none of DeepSpeed's own operators: they would be compiled at run time, and a process
    killed meanwhile leaves a lock that hangs every later one. hang_seconds (0: no limit): collectives wait as long as
    pipeline.cluster.watchdog does at most, which says more.
    """
    limit = datetime.timedelta(seconds=longest(hang_seconds)) if hang_seconds else _NO_LIMIT
    place = rank_info(os.environ)
    keep_compiled_code_private()
    os.environ.update(rendezvous_variables(os.environ))
    cuda = torch.cuda.is_available()
    if not cuda:
        refuse_loopback_name(place, os.environ)
    deepspeed = quiet_deepspeed()
    _limit_collectives(limit)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=limit)
    device = own_device(place)
    return World(dist.get_rank(), dist.get_world_size(), device)


def quiet_deepspeed() -> Any:
    """The deepspeed module, quiet, and told to compile neither its shared-memory operator nor Muon's update, for whose
    decorators alone it would import the compiler, in seconds, at every start."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # DeepSpeed calls torch.distributed functions whose new names torch 2.13 advertises at every call
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\..* is deprecated")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # on a GPU without the CUDA toolkit it says of every operator that it cannot be compiled, once a rank
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        deepspeed.utils.logger.setLevel("ERROR")
        deepspeed.runtime.compiler.compile = lambda: lambda function: function  # used by Muon alone
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


def destroy_process_group() -> None:
    """End the process group, and remove what this process has offloaded to NVMe."""
    remove_own_folders()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
