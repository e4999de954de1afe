"""The colour jitter against the reference, bit for bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from beitforge.kernels.pixels.reference import jittered_reference

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def problems(height: int, width: int, device: torch.device, ours: Callable[..., Tensor] | None = None) -> list[str]:
    """What is wrong with `ours`, a function as jittered; by default the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    views = (
        torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8),
        torch.rand(2, 3, generator=generator) + 0.5,
        torch.arange(2),
        torch.full((2,), 117.0),
    )
    if ours is None:
        from beitforge.kernels.pixels.fused import jittered_fused as ours

        assert ours is not None
    there = ours(*(view.to(device) for view in views), (_MEAN, _STD), torch.float32)
    same = torch.equal(there.cpu(), jittered_reference(*views, (_MEAN, _STD), torch.float32))
    return [] if same else ["pixels are not bit for bit those of its reference"]
