"""The moving average of a model's weights, in the optimizer's state: sharded, saved and laid out as the moments are.

Decay as the released code has it (timm's ModelEma): average ← decay · average + (1 − decay) · weight after each update.
Knows where DeepSpeed 0.19 keeps masters, held by tests/pipeline/checkpoints. Must not know model, shards or any stage.
"""

from typing import Any

import torch
from torch import Tensor

AVERAGE = "average"  # its name in the optimizer's state


class WeightAverage:
    """The averages of this rank's masters; they begin as the weights are."""

    def __init__(self, optimizer: Any, decay: float):
        """optimizer: DeepSpeed's, around AdamW."""
        self.decay, inner = decay, getattr(optimizer, "optimizer", optimizer)
        self.masters, self.averages = [], []
        for group, master in _masters(optimizer):
            begin_moments(inner.state[master], group, master, 0.0)
            inner.state[master][AVERAGE] = master.detach().clone()
            self.masters.append(master.detach())
            self.averages.append(inner.state[master][AVERAGE])

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights. Each product is rounded by itself, so that it does not matter how the numbers
        lie on ranks; beside the averages one master's memory is taken."""
        for master, average in zip(self.masters, self.averages, strict=True):
            average.mul_(self.decay).add_(master * (1 - self.decay))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and masters; the model's weights stay as they are."""
        for master, average in zip(self.masters, self.averages, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)


def begin_moments(state: dict[str, Any], group: dict, master: Tensor, step: float) -> None:
    """Give one of AdamW's tensors the state of `step` steps, its moments zero unless it has some. group: settings."""
    device = master.device if group.get("fused") or group.get("capturable") else "cpu"
    state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    for key in ("exp_avg", "exp_avg_sq"):
        state.setdefault(key, torch.zeros_like(master, memory_format=torch.preserve_format))


def _masters(optimizer: Any) -> list[tuple[dict, Tensor]]:
    """This rank's float32 masters as the inner optimizer sees them, each with the settings of its group."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3, whose groups are empty between steps
        flats = enumerate(optimizer.fp32_partitioned_groups_flat)
        return [(inner.param_groups[optimizer.sub_group_to_group_id[number]], flat) for number, flat in flats]
    return [(group, master) for group in inner.param_groups for master in group["params"]]
