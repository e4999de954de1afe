"""What is minimised, as functions of a model, a batch and the step. Must not know shards, deepspeed or any stage."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from beitforge.kernels.pixels import jittered
from beitforge.pipeline.config.settings import DVAE_STRIDE, Config, Tokenizer
from beitforge.pipeline.model.dropout import hashed
from beitforge.pipeline.model.pixels import jitter, tokenizer_input


class ObjectiveBatch(Protocol):
    """The tensors of a batch that objectives read (shards.stream.loader.Batch)."""

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
    def pivots(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def draws(self) -> dict[str, Tensor]: ...


def encoder_input(config: Config, batch: ObjectiveBatch, dtype: torch.dtype = torch.float32) -> Tensor:
    """Jittered, normalised pixels [B, 3, H, W] for the encoder."""
    normal = (config.model.mean, config.model.std)
    views = (batch.pixels, batch.jitters, batch.orders, batch.pivots)
    return jittered(*views, normal, dtype, config.model.kernels)


@torch.no_grad()
def online_tokens(tokenize: Callable[[Tensor], Tensor], batch: ObjectiveBatch) -> Tensor:
    """Visual tokens i64 [B, N] of a batch that brings the tokenizer's view instead of recorded tokens."""
    return tokenize(jitter(batch.tokenizer_pixels, batch.jitters, batch.orders, batch.pivots))


def masked_token_loss(
    config: Config, model: Callable, batch: ObjectiveBatch, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the masked patches' tokens, mean over them (docs/recipe.md, "Model"); and masked accuracy.

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
    settings: Tokenizer, model: Callable, batch: ObjectiveBatch, step: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruction + KL of each posterior to the uniform prior (weight warmed up over the first quarter of training)
    + KL of the batch's mean posterior to it, which keeps every code in use. `generator` draws the Gumbel noise."""
    target = tokenizer_input(jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots))
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
    # pixel errors are summed over a field so that the weights mean the same for any image size
    loss = error * 3 * DVAE_STRIDE**2 + settings.kl_weight * warm * kl + settings.usage_weight * usage
    measures = {"reconstruction_mse": error.detach(), "kl": kl.detach(), "usage_kl": usage.detach()}
    return loss, measures


def supervised_input(config: Config, batch: ObjectiveBatch) -> Tensor:
    """Normalised pixels f32 [B, 3, H, W] as the batch's draws have them: erased, then mixed."""
    pixels_BCHW = encoder_input(config, batch)
    if "erase" in batch.draws:
        pixels_BCHW = erased(pixels_BCHW, batch.draws["erase"], batch.draws["noise"])
    if "share" in batch.draws:
        pixels_BCHW = mixed(pixels_BCHW, batch.draws["blend"], batch.draws["box"])
    return pixels_BCHW


def classification_loss(
    config: Config, model: Callable, batch: ObjectiveBatch, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy with smoothed labels, in float32, mean over the micro batch; and the share where the largest logit
    is that of the label with the larger part in the mixture.

    A mixed image's target is its own label by `share`, its partner's by the rest: the same cross entropy as with
    timm's soft targets, as both are linear in the target.
    """
    draws = batch.draws.get("keep"), batch.draws.get("dropout")
    logits = model(supervised_input(config, batch).to(dtype), *draws).float()
    labels, share = batch.labels, batch.draws.get("share")
    loss = _smoothed(config, logits, labels)
    if share is not None:
        loss = share * loss + (1 - share) * _smoothed(config, logits, labels.flip(0))
        labels = torch.where(share >= 0.5, labels, labels.flip(0))
    return loss.mean(), {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}


def _smoothed(config: Config, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=config.finetune.smoothing)


def classified(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sums over a batch, f64 [4], each sample counted by its weight f32 [B]: cross entropy, the label is the first, it
    is among the first five, ones."""
    logits = logits.double()
    loss = F.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    counted = torch.stack([loss, best[:, 0].double(), best.any(dim=1).double(), torch.ones_like(loss)])
    return torch.where(weights > 0, counted, 0.0).sum(dim=1)


def erased(pixels_BCHW: Tensor, boxes_B4: Tensor, seeds_B: Tensor) -> Tensor:
    """Pixels with standard normal noise inside boxes (i64: top, left, height, width), of each image by its seed
    (i64, 32 bits). Noise by hashing (lowbias32), so that it is the same wherever the image is computed."""
    b, c, h, w = pixels_BCHW.shape
    counters = torch.arange(c * h * w, device=pixels_BCHW.device)
    x = hashed(hashed(counters)[None] ^ seeds_B[:, None])
    uniform = ((x >> 9).float() + 0.5) / 2**22 - 1  # 23 bits: never ±1, whose noise is infinite
    noise_BCHW = (torch.erfinv(uniform) * math.sqrt(2)).view(b, c, h, w).to(pixels_BCHW.dtype)
    return torch.where(inside(boxes_B4, h, w), noise_BCHW, pixels_BCHW)


def mixed(pixels_BCHW: Tensor, blend_B: Tensor, boxes_B4: Tensor) -> Tensor:
    """Every image mixed with its partner, as far from the batch's end as it is from the beginning: its own by `blend`
    outside its box, its partner's alone inside. As timm has it, but for a draw of its own for every pair."""
    others_BCHW = pixels_BCHW.flip(0)
    blend_B111 = blend_B[:, None, None, None]
    blended = pixels_BCHW * blend_B111 + others_BCHW * (1 - blend_B111)
    return torch.where(inside(boxes_B4, *pixels_BCHW.shape[2:]), others_BCHW, blended)


def inside(boxes_B4: Tensor, height: int, width: int) -> Tensor:
    """bool [B, 1, H, W]: the pixels of boxes top, left, height, width."""
    rows = torch.arange(height, device=boxes_B4.device)[None, :, None]
    columns = torch.arange(width, device=boxes_B4.device)[None, None]
    top, left, tall, wide = (side[:, None, None] for side in boxes_B4.unbind(1))
    within = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    return within[:, None]
