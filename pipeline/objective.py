"""What is minimised, as functions of a model, a batch and the step. Must not know shards, deepspeed or any stage."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.pixels import jittered
from pipeline.config import DVAE_STRIDE, Config, Tokenizer
from pipeline.pixels import jitter, tokenizer_input


class Views(Protocol):
    """The tensors of a batch that objectives read (shards.loader.Batch)."""

    @property
    def samples(self) -> Tensor: ...
    @property
    def pixels(self) -> Tensor: ...
    @property
    def tokenizer_pixels(self) -> Tensor: ...
    @property
    def tokens(self) -> Tensor: ...
    @property
    def jitters(self) -> Tensor: ...
    @property
    def orders(self) -> Tensor: ...
    @property
    def mean_greys(self) -> Tensor: ...
    @property
    def draws(self) -> dict[str, Tensor]: ...


def encoder_input(config: Config, batch: Views, dtype: torch.dtype = torch.float32) -> Tensor:
    """Jittered, normalised pixels [B, 3, H, W] for the encoder."""
    normal = (config.model.mean, config.model.std)
    views = (batch.pixels, batch.jitters, batch.orders, batch.mean_greys)
    return jittered(*views, normal, dtype, config.model.kernels)


@torch.no_grad()
def online_tokens(tokenize: Callable[[Tensor], Tensor], batch: Views) -> Tensor:
    """Visual tokens i64 [B, N] of a batch that brings the tokenizer's view instead of recorded tokens."""
    return tokenize(jitter(batch.tokenizer_pixels, batch.jitters, batch.orders, batch.mean_greys))


def masked_token_loss(
    config: Config, model: Callable, batch: Views, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the masked patches' tokens, mean over them (RECIPE, "Model"); and masked accuracy.

    `dtype` is that of the model's input; the loss is computed in float32.
    """
    pixels_BCHW = encoder_input(config, batch, dtype)
    mask_BN, keep_BL2 = batch.draws["mask"], batch.draws.get("keep")
    loss, right, count = model(pixels_BCHW, mask_BN, config.mask.num_patches, keep_BL2, batch.tokens)
    count = count.clamp(min=1)
    return loss / count, {"masked_accuracy": right / count}


def dvae_temperature(settings: Tokenizer, step: int, steps: int) -> float:
    """Gumbel-softmax temperature: exponential from start to end over `anneal_share` of training, then constant."""
    progress = min(1.0, step / max(1.0, settings.anneal_share * steps))
    return settings.temperature_start * (settings.temperature_end / settings.temperature_start) ** progress


def dvae_loss(
    settings: Tokenizer, model: Callable, batch: Views, step: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction + KL of each posterior to the uniform prior (weight warmed up over the first quarter of training)
    + KL of the batch's mean posterior to it, which keeps every code in use. `generator` draws the Gumbel noise."""
    target = tokenizer_input(jitter(batch.pixels, batch.jitters, batch.orders, batch.mean_greys))
    shape = (len(target), settings.vocabulary, *settings.grid)
    uniform = torch.rand(shape, generator=generator, device=target.device).clamp(1e-9, 1 - 1e-7)
    noise = -(-uniform.log()).log()
    reconstruction, logits_BVhw = model(target, dvae_temperature(settings, step, steps), noise)
    log_q = logits_BVhw.log_softmax(dim=1)
    log_v = math.log(settings.vocabulary)
    kl = (log_q.exp() * log_q).sum(dim=1).mean() + log_v
    mean_V = log_q.exp().mean(dim=(0, 2, 3))
    usage = (mean_V * (mean_V + 1e-12).log()).sum() + log_v
    error = F.mse_loss(reconstruction, target)
    warm = min(1.0, step / max(1.0, 0.25 * steps))
    # pixel errors are summed over a field so that the weights mean the same for any picture size
    loss = error * 3 * DVAE_STRIDE**2 + settings.kl_weight * warm * kl + settings.usage_weight * usage
    measures = {"reconstruction_mse": error.detach(), "kl": kl.detach(), "usage_kl": usage.detach()}
    return loss, measures
