"""The linear layer's cross entropy and its gradients against the reference, at a shape."""

from collections.abc import Callable

import torch
from torch import Tensor

from beitforge.kernels.cross_entropy.reference import linear_cross_entropy_reference
from beitforge.kernels.probe import differences

_ROWS = 64


def problems(
    vocabulary: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    ours: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> list[str]:
    """What is wrong with `ours`, a function as linear_cross_entropy; by default the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, width, generator=generator).to(device, dtype)
    weight = (0.1 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    tokens = torch.randint(vocabulary, (_ROWS,), generator=generator).to(device)
    counts = torch.ones(_ROWS, device=device)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if ours is not None:
            return ours(x, weight, bias, tokens, counts)[0]
        from beitforge.kernels.cross_entropy.operator import linear_cross_entropy_fused

        return linear_cross_entropy_fused(x, weight, bias, tokens, counts, True)[0]

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, weight, bias, tokens, counts.to(x.dtype))[0]

    return differences("cross entropy", fused, reference, [x, weight, bias], dtype)
