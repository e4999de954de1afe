"""The end of an optimizer step with few kernels and one read of the host.

DeepSpeed looks at every parameter for overflow, takes every parameter's norm and asks the device for each answer. Here
one norm of the flat gradients tells whether they are finite; it crosses the ranks together with the flags of the step
(a loss that is not finite, a request to stop, …) in one all-reduce, and the host reads the result once.

With torch's fused AdamW, in bf16 or in fp32 without ZeRO, the device decides for itself whether the update is applied
(`found_inf`), and the host reads while the device works on it. Elsewhere the host decides, and reads before the update:
for fp16's loss scale, ZeRO-3 and Muon DeepSpeed branches in Python.

Imports deepspeed; the engine imports it once that is set up. Must not know model, shards or any stage.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

_SLACK = 1e-6  # added to the norm before it is compared with the limit, as DeepSpeed and torch do


class Outcome(NamedTuple):
    """What every rank knows of a step: the gradient's norm over all ranks before clipping (inf where it is not finite),
    whether the update was applied, and for each flag the number of ranks that raised it."""

    norm: float
    updated: bool
    flags: list[float]


class Agreement:
    """The norm and the flags of a step, reduced over all ranks at once and read once."""

    def __init__(self, device: torch.device, clip_norm: float, adamw: torch.optim.Optimizer | None):
        """clip_norm: the largest norm, 0 for any. adamw: the fused optimizer that leaves an update out by itself; None
        where the host decides."""
        self.device, self.clip_norm, self.adamw = device, clip_norm, adamw
        self.flags: Tensor | None = None
        self.reduced: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def begin(self, flags: Tensor | None) -> None:
        """Start a step. flags: what this rank raises, 0 or 1 each, f64 [n] on the device."""
        self.flags, self.reduced = flags, None

    def norm(self, norms: list[Tensor], scale: float, copies: int = 1) -> Tensor:
        """The norm f32 of the gradient, of which this rank has the parts with these norms, and `copies` ranks each
        part; all are larger by the loss `scale`. It is on the device, and on the host where the host decides."""
        squares = torch.stack(norms).double().square().sum() / (copies * scale**2)
        total = self._reduce(squares)[0].sqrt()
        if self.adamw is not None:
            self.adamw.found_inf = (~total.isfinite()).float()  # type: ignore[attr-defined]
            if self.clip_norm:  # fused AdamW divides the gradient by it
                self.adamw.grad_scale = self.clip(total).float()  # type: ignore[attr-defined]
            self._copy()
        else:
            total = self._read()[0].sqrt()
        return (total * scale).float()

    def clip(self, norm: Tensor) -> Tensor:
        """What a gradient of this norm is divided by: more than 1 where it is over the limit."""
        return ((norm + _SLACK) / self.clip_norm).clamp(min=1.0)

    def outcome(self, norm: Any, updated: bool) -> Outcome:
        """The step's outcome. norm, updated: what DeepSpeed says, where it took the norm itself."""
        if self.reduced is None:  # alike on all ranks, of which each brings its part
            square = float(norm) ** 2 if updated and norm is not None else math.nan
            self._reduce(torch.tensor(square, dtype=torch.float64, device=self.device) / dist.get_world_size())
        squares, *flags = self._read().tolist()
        finite = math.isfinite(squares)
        return Outcome(math.sqrt(squares) if finite else math.inf, finite, flags)

    def _reduce(self, squares: Tensor) -> Tensor:
        parts = [squares[None]] if self.flags is None else [squares[None], self.flags]
        self.reduced = torch.cat(parts)
        dist.all_reduce(self.reduced)
        return self.reduced

    def _copy(self) -> None:
        """Start the copy to the host; what the device is given later does not delay it."""
        assert self.reduced is not None, "there is a norm"
        if self.reduced.is_cuda:
            self.reduced = self.reduced.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def _read(self) -> Tensor:
        """Wait for the copy: the one time in a step that the host waits for the device."""
        if self.copied is None:
            self._copy()
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        assert self.reduced is not None
        return self.reduced


def attach(engine: Any, device: torch.device) -> Agreement:
    """Make a DeepSpeed engine end its steps as this module says.

    With optimizer offload, and with an optimizer of a kind that is not below, DeepSpeed keeps its own way; norm and
    flags are then reduced afterwards.
    """
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    fused = type(inner) is torch.optim.AdamW and bool(inner.defaults.get("fused"))
    ours = _OURS.get(type(optimizer))
    if optimizer is inner:  # fp32 without ZeRO
        ours = type("Plain", (_Plain, type(inner)), {})
    elif getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        ours = None
    decides = fused and (optimizer is inner or (engine.bfloat16_enabled() and ours in (_Partitioned, _Replicated)))
    agreement = Agreement(device, float(engine.gradient_clipping()), inner if decides else None)
    if ours is not None:
        optimizer.__class__, optimizer.agreement = ours, agreement
        engine.clip_fp32_gradients = lambda: None  # done by _Plain
    if decides:
        optimizer.check_grad_overflow = False  # ZeRO 1 and 2 would ask the device for the norm
    return agreement


def flat_norm(flat: Tensor) -> Tensor:
    """The norm of one long vector. On a CPU in float64: the float32 sum of 10⁸ squares is wrong by a percent there."""
    return torch.linalg.vector_norm(flat, dtype=torch.float64 if flat.device.type == "cpu" else torch.float32)


class _Partitioned(DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2: a rank's share of a group's gradient is made flat before its norm is taken, not after."""

    agreement: Agreement

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: the norm tells."""

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        for group, gradients in self.averaged_gradients.items():
            flat = self.flatten_dense_tensors_aligned(gradients, int(self.partition_size[group]))
            self.averaged_gradients[group] = [flat]
        norms = [flat_norm(flat) for (flat,) in self.averaged_gradients.values()]
        return self.agreement.norm(norms, float(self.loss_scale))

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        if self.agreement.adamw is None:
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)


class _Sharded(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3: likewise."""

    agreement: Agreement

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: the norm tells."""

    def _get_norm_groups(self) -> list[Tensor]:
        for group in range(len(self.fp16_groups)):
            self.averaged_gradients[group] = [self.flatten(self.averaged_gradients[group])]
        norms = [flat_norm(self.averaged_gradients[group][0]) for group in range(len(self.fp16_groups))]
        return [self.agreement.norm(norms, float(self.loss_scale))]


class _Replicated(FP16_UnfusedOptimizer):
    """16 bits without ZeRO: many parameters at a time."""

    agreement: Agreement

    @torch.no_grad()
    def step(self, closure: None = None) -> bool:
        parameters = [parameter for group in self.fp16_groups for parameter in group]
        masters = [master for group in self.fp32_groups for master in group]
        for master, parameter in zip(masters, parameters, strict=True):
            gradient = parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.to(master.dtype)
        scale = float(self.loss_scale_config.cur_scale)
        self.overflow = not _clipped(self.agreement, [master.grad for master in masters], scale)
        if self.overflow:
            return self._skip_invalid_grad_norm()
        self._update_scale(False)
        self.optimizer.step()
        torch._foreach_copy_(parameters, masters)
        for master in masters:
            master.grad = None
        return self.overflow


class _Plain(torch.optim.Optimizer):
    """fp32 without ZeRO: the optimizer itself, behind the norm and its limit."""

    agreement: Agreement

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if _clipped(self.agreement, [parameter.grad for parameter in parameters if parameter.grad is not None], 1.0):
            super().step(closure)


def _clipped(agreement: Agreement, gradients: list[Tensor], scale: float) -> bool:
    """Undo the loss scale and clip; False where the host knows that the update must be left out."""
    norm = agreement.norm(list(torch._foreach_norm(gradients)), scale, dist.get_world_size())
    if agreement.adamw is not None:
        return True
    if not math.isfinite(norm):
        return False
    divisor = scale * float(agreement.clip(norm / scale)) if agreement.clip_norm else scale
    if divisor != 1.0:
        torch._foreach_div_(gradients, divisor)
    return True


_OURS: dict[type, type] = {
    DeepSpeedZeroOptimizer: _Partitioned,
    DeepSpeedZeroOptimizer_Stage3: _Sharded,
    FP16_UnfusedOptimizer: _Replicated,
}
