"""Dropout as a function of the sample: which numbers are dropped follows from a seed of the sample, from where in the
model and from the number's place within the sample. So it is the same on any rank, in any micro batch, after a restart
and when activations are computed again, and no generator's state is kept.

Shape letters as in pipeline.model.beit. Must not know shards or any stage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDING, ATTENTION, OUTPUT, MLP = range(4)  # where in a layer; the embedding's is before the first


@dataclass(frozen=True)
class Dropout:
    """The rates of a model's dropout, what it draws from (i64 [B] of 32 bits, one of each sample), and the layer. No
    tuple, which DeepSpeed's ZeRO-3 would take apart."""

    rate: float
    attention_rate: float
    seeds_B: Tensor  # noqa: N815
    layer: int = 0

    def outputs(self, x_BSD: Tensor, where: int) -> Tensor:
        """An embedding or what a branch puts out, with dropout."""
        return dropped(x_BSD, self.rate, self.seeds_B, 4 * self.layer + where)

    def probabilities(self, x_BASS: Tensor) -> Tensor:
        """Attention's probabilities, with dropout."""
        return dropped(x_BASS, self.attention_rate, self.seeds_B, 4 * self.layer + ATTENTION)


def dropped(x: Tensor, rate: float, seeds_B: Tensor, site: int) -> Tensor:
    """x [B, …] with each number 0 with probability `rate`, else divided by 1 - rate, as torch's dropout."""
    if rate == 0:
        return x
    places = torch.arange(x[0].numel(), device=x.device)
    streams_B1 = hashed(seeds_B ^ (0x9E3779B9 * (site + 1) & 0xFFFFFFFF))[:, None]
    keeps = (hashed(hashed(places) ^ streams_B1) >= int(rate * 2**32)).view(x.shape)
    return torch.where(keeps, x * (1 / (1 - rate)), 0)


def hashed(x: Tensor) -> Tensor:
    """32 bits of 32, in i64 (lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
