"""One full training step on one GPU: ours beside transformers' and timm's BEiT, eager and compiled.

    python -m benchmarks.training.train            # on a GPU; some minutes
    python -m benchmarks.training.train --dry      # tiny models on a CPU: every step runs and learns

Forward, loss on the masked patches, backward, clipping, AdamW, all in bf16 weights on the same batch, without loader,
tokenizer or DeepSpeed. timm's BEiT takes no mask: it gets the same head on the same patches, and is spared the mask.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.plan.costs import training_flops
from benchmarks.kernels.kernels import rates
from benchmarks.results import write

MASKED, V = 75, 8192
SIZES = (("base", Model(drop_path=0.0), 256), ("large", Model(layers=24, width=1024, heads=16, drop_path=0.0), 128))
DRY = (("dry", Model(input_size=Size(64, 64), layers=2, width=48, heads=3, drop_path=0.0), 2),)


@dataclass(frozen=True)
class Contender:
    """A model and its loss on (pixels, mask, tokens of the masked patches in row order)."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(model: Model, device: torch.device, dtype: torch.dtype, masked: int) -> Iterator[Contender]:
    """One at a time, so that memory holds one; peers that are not installed are left out."""
    for kernels in ("auto", "sdpa") if device.type == "cuda" else ("auto",):
        yield _ours(dataclasses.replace(model, kernels=kernels), device, dtype, masked)
    for build in (_transformers, _timm):
        try:
            yield build(model, device, dtype)
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)


def _ours(model: Model, device: torch.device, dtype: torch.dtype, masked: int) -> Contender:
    beit = Beit(model, V, seed=0).to(device, dtype)

    def loss(pixels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        of_patches = torch.zeros(mask.shape, dtype=tokens.dtype, device=tokens.device).masked_scatter(mask, tokens)
        total, _, count = beit(pixels, mask, masked, None, of_patches)
        return total / count

    return Contender("ours" if model.kernels == "auto" else "ours, SDPA", beit, loss)


def _transformers(model: Model, device: torch.device, dtype: torch.dtype) -> Contender:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=V,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.width,
        layer_norm_eps=1e-6,
        image_size=model.input_size.height,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        drop_path_rate=0.0,
        attn_implementation="sdpa",
    )
    peer = BeitForMaskedImageModeling(config).to(device, dtype).train()

    def loss(pixels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        return peer(pixels, bool_masked_pos=mask, labels=tokens).loss

    return Contender("transformers", peer, loss)


def _timm(model: Model, device: torch.device, dtype: torch.dtype) -> Contender:
    from timm.models.beit import Beit as TimmBeit

    peer = TimmBeit(
        img_size=tuple(model.input_size),
        embed_dim=model.width,
        depth=model.layers,
        num_heads=model.heads,
        init_values=model.layer_scale_init,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        num_classes=0,
        global_pool="",
        use_fc_norm=False,
    )
    module = nn.ModuleDict({"encoder": peer, "head": nn.Linear(model.width, V)}).to(device, dtype).train()

    def loss(pixels: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        features = peer.forward_features(pixels)[:, 1:][mask]
        return F.cross_entropy(module["head"](features).float(), tokens)

    return Contender("timm", module, loss)


def batch(model: Model, images: int, masked: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *model.input_size, generator=generator).to(device, dtype)
    mask = torch.rand(images, model.num_patches, generator=generator).argsort(dim=1) < masked
    tokens = torch.randint(V, (images * masked,), generator=generator)
    return pixels, mask.to(device), tokens.to(device)


def stepper(contender: Contender, tensors: tuple[Tensor, ...], compiled: bool) -> Callable[[], Tensor]:
    """One whole step; returns the loss."""
    parameters = list(contender.module.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=tensors[0].is_cuda)
    loss_of = torch.compile(contender.loss, dynamic=False) if compiled else contender.loss

    def step() -> Tensor:
        loss = loss_of(*tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def check(step: Callable[[], Tensor], name: str) -> None:
    """A step starts near ln V and learns its batch, or it has no speed."""
    first = float(step())
    assert abs(first / float(torch.log(torch.tensor(float(V)))) - 1) < 0.05, f"{name} starts at a loss of {first:.3f}"
    for _ in range(5):
        last = float(step())
    assert last < first, f"{name} does not learn: {first:.3f}, then {last:.3f}"


def measure(name: str, model: Model, images: int, product_rate: float) -> list[dict]:
    """A row for each contender, eager and compiled."""
    from triton.testing import do_bench

    device, dtype, rows = torch.device("cuda"), torch.bfloat16, []
    tensors = batch(model, images, MASKED, device, dtype)
    flops = images * training_flops(model, V, MASKED)
    for compiled in (False, True):
        for contender in contenders(model, device, dtype, MASKED):
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step = stepper(contender, tensors, compiled)
            check(step, contender.name)
            middle, low, high = do_bench(step, warmup=500, rep=2000, quantiles=[0.5, 0.2, 0.8])
            rows.append(
                {
                    "model": name,
                    "step": f"{contender.name}{', compiled' if compiled else ''}",
                    "ms": f"{middle:.1f} ({low:.1f}–{high:.1f})",
                    "images/s": f"{1e3 * images / middle:.0f}",
                    "MFU": f"{flops / middle * 1e3 / product_rate:.1%}",
                    "memory": f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                    "_ms": middle,
                }
            )
            del step, contender
    return rows


def ratios(rows: list[dict]) -> dict[str, float]:
    """The fastest peer's time over ours, by model."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        times = {row["step"]: row["_ms"] for row in rows if row["model"] == model}
        ours = min(time for step, time in times.items() if step in ("ours", "ours, compiled"))
        peers = [time for step, time in times.items() if not step.startswith("ours")]
        if peers:
            found[f"{model}: fastest peer / ours"] = min(peers) / ours
    return found


def dry() -> None:
    """Tiny models on the CPU in float32."""
    for name, model, images in DRY:
        tensors = batch(model, images, 5, torch.device("cpu"), torch.float32)
        for contender in contenders(model, torch.device("cpu"), torch.float32, 5):
            check(stepper(contender, tensors, compiled=False), contender.name)
            print(f"{name}: {contender.name} learns")


def main() -> None:
    """The table, or the dry run."""
    if "--dry" in sys.argv:
        return dry()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.training.train needs a GPU; --dry runs every step without one")
    product_rate = rates(torch.device("cuda"))[1]
    rows: list[dict] = []
    notes = [
        f"A whole step in bf16 without loader and DeepSpeed, {', '.join(f'{n} {b} images' for n, _, b in SIZES)}; "
        f"median and the fifths at either end. MFU against the {product_rate / 1e12:.0f} TFLOP/s that a large product "
        "reached on this chip; operations as docs/recipe.md counts them, the last block whole."
    ]
    for size in SIZES:
        rows += measure(*size, product_rate)
        write("train", "one training step on one GPU", rows, ratios(rows), notes)
    return None


if __name__ == "__main__":
    main()
