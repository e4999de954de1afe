"""What tokens of all views of a set take: GPU-hours and disk. Must not know torch."""

from dataclasses import dataclass

from beitforge.pipeline.config.settings import Config
from beitforge.pipeline.plan.costs import tokenizer_macs
from beitforge.pipeline.plan.estimate import Machine
from beitforge.pipeline.plan.loading import TOKEN_ROW


@dataclass(frozen=True)
class Tokenization:
    """Of all views of all images, once."""

    tokenizer: str
    gpu_hours: float
    disk: float


def tokenizations(config: Config, machine: Machine, images: int) -> list[Tokenization]:
    """With the own dVAE and with DALL-E's encoder: 2 operations a multiply-add, `tokenizer.precision`, all K views."""
    views = config.view.num_views
    disk = float(images * views * (2 * config.model.num_patches + TOKEN_ROW) + 9 * images)
    rate = machine.product_flops(config.tokenizer.precision)
    found = []
    for name, dalle in (("own dVAE", False), ("DALL-E", True)):
        seconds = images * views * 2 * tokenizer_macs(config.tokenizer, dalle) / rate
        found.append(Tokenization(name, seconds / 3600, disk))
    return found
