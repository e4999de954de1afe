"""DeepSpeed: start-up, configuration, and the few calls the loop needs. Must not know model, shards or stages."""

import contextlib
import json
import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from beitforge.pipeline.distributed.collectives import World
from beitforge.pipeline.distributed.deepspeed_config import SPEAKS, Setup, deepspeed_config
from beitforge.pipeline.distributed.device import DTYPES
from beitforge.pipeline.distributed.muon import muon_optimizer
from beitforge.pipeline.distributed.nvme_offload import with_own_folder
from beitforge.pipeline.distributed.process_group import quiet_deepspeed
from beitforge.pipeline.distributed.weight_average import WeightAverage
from beitforge.pipeline.errors import ConfigError, HostError
from beitforge.pipeline.runs.checkpoints import checkpoint_bytes

if TYPE_CHECKING:
    from beitforge.pipeline.distributed.optimizer_step import Outcome


@contextlib.contextmanager
def _objections(setup: Setup) -> Iterator[None]:
    """Turn what DeepSpeed raises over a deepspeed section, whatever it is, into one line of a host. Without a section
    it is nobody's mistake."""
    try:
        yield
    except Exception as error:
        if not setup.overrides or isinstance(error, ConfigError):
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        detail = getattr(error, "errors", None)  # pydantic's: where, and what
        if callable(detail) and (found := detail()):
            said = f"{'.'.join(map(str, found[0]['loc']))}: {found[0]['msg']}"
        section = json.dumps(setup.overrides)
        raise HostError(
            f"deepspeed: DeepSpeed refuses this section on {socket.gethostname()}: {said.strip()[:300]}; change it, or "
            f"leave out what it names ({section[:200]})"
        ) from error


class Engine:
    """A model under DeepSpeed. `model` is what objectives call; parameters live wherever ZeRO put them."""

    def __init__(self, module: nn.Module, groups: list[dict], setup: Setup, world: World):
        """groups: parameter groups of AdamW, or of Muon where setup.muon. Raises HostError for fp16 without a GPU, and
        for what DeepSpeed has against the deepspeed section."""
        if setup.precision == "fp16" and world.device.type == "cpu":
            host = socket.gethostname()
            raise HostError(f"train.precision fp16 needs a GPU, and {host} shows none; on a CPU use bf16 or fp32")
        self.world, self.setup = world, setup
        self.dtype = DTYPES[setup.precision]
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.groups = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
        deepspeed = quiet_deepspeed()
        if any(name in setup.overrides for name in SPEAKS):
            deepspeed.utils.logger.setLevel("INFO")
        with _objections(setup):
            placed = replace(setup, overrides=with_own_folder(setup.overrides))
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module, model_parameters=groups, config=deepspeed_config(placed), optimizer=muon_optimizer(setup)
            )
        for state in getattr(self.optimizer, "optimizer", self.optimizer).state.values():
            if "step" in state:  # not of Muon
                state["step"].zero_()  # DeepSpeed's optimizer without ZeRO warms up with a step that AdamW counts
        # these import deepspeed, which is set up by now
        from beitforge.pipeline.distributed.file_writer import Writer
        from beitforge.pipeline.distributed.optimizer_step import attach

        self.writer = self.deepspeed.checkpoint_engine = Writer()
        # two programs that it would lay beside the checkpoints, which run what a pickle says; `export` reads them
        self.deepspeed._copy_recovery_script = lambda save_path: None
        self.deepspeed.config = deepspeed_config(setup)  # checkpoints hold it: the section as it was given
        # it would copy what is on NVMe beside a checkpoint, which holds that already (nvme_offload)
        self.deepspeed.zero_nvme_offload_optimizer = lambda: False
        self.agreement = attach(self.deepspeed, world.device)
        self.average = WeightAverage(self.optimizer, setup.ema_decay) if setup.ema_decay else None
        if setup.compile:
            self.deepspeed.compile(compile_kwargs={"mode": setup.compile_mode})

    @property
    def model(self) -> Callable:
        return self.deepspeed

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on disk."""
        numbers = {name: getattr(p, "ds_numel", p.numel()) for name, p in self.module.named_parameters()}
        muon = {name for name, p in self.module.named_parameters() if getattr(p, "use_muon", False)}
        matrices = [[numbers[name] for name in group] for group in self.groups if muon.issuperset(group)]
        total, stage = sum(numbers.values()), self.setup.zero_stage
        moments = checkpoint_bytes(total, stage, self.dtype.itemsize, matrices, self.world.size)
        return moments + (4 * total if self.average is not None else 0)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; DeepSpeed divides by the number of accumulation steps.

        A loss that is not finite is given gradients that are not, so that `step` leaves the update out on every rank.
        """
        finite = torch.isfinite(loss.detach())
        self.deepspeed.backward(loss * torch.where(finite, 1.0, math.nan))

    def step(self, learning_rate: float, flags: Tensor | None = None, weight_decay: float | None = None) -> "Outcome":
        """After the last micro batch: clip, update, clear; a group's rate is learning_rate times its `lr_scale`, if it
        has one. The update is left out, and nothing has changed, where the norm over all ranks is not finite.

        weight_decay: of the groups that have a `decay_divisor`, by which it is divided; None leaves all as they are.

        flags: what this rank tells the others at this step, 0 or 1 each, f64 [n] on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
            if weight_decay is not None and "decay_divisor" in group:
                group["weight_decay"] = weight_decay / group["decay_divisor"]
        self.agreement.begin(flags)
        self.deepspeed.step()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        outcome = self.agreement.outcome(self.deepspeed.get_global_grad_norm(), not overflow)
        self.deepspeed.skipped_steps += not (outcome.updated or overflow)  # DeepSpeed has counted the other
        if self.average is not None and outcome.updated:
            self.average.update()
        return outcome

    @property
    def scales_loss(self) -> bool:
        """Whether gradients beyond the range are part of the search for a loss scale (fp16), and no fault."""
        return self.dtype == torch.float16

    def accumulate(self) -> None:
        """After a micro batch that is not the last: DeepSpeed counts it."""
        self.deepspeed.step()
