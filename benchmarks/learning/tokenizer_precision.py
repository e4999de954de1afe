"""How many visual tokens change when the tokenizer computes in less than float32."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from beitforge.pipeline.config.loading import load_config
from beitforge.pipeline.data.pretraining import view_policy
from beitforge.pipeline.model.pixels import jitter
from beitforge.pipeline.tokenizers.dalle import Dalle, DalleShape
from beitforge.pipeline.tokenizers.precision import autocast_as
from beitforge.pipeline.tokenizers.storage import VisualTokenizer, load_tokenizer
from beitforge.shards.stream.image_set import ImageSet
from beitforge.shards.stream.loader import SequentialOrder, Stream
from beitforge.shards.stream.view_sources import DrawnViews
from benchmarks.results import write

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "runs" / "demo"
IMAGES = 48
_TF32_BITS = 13  # of float32's 23 mantissa bits that TF32 drops


def main() -> None:
    """The demo's dVAE and a DALL-E encoder of full size with random weights, on the demo's test tiles."""
    if not (DEMO / "tokenizer" / "tokenizer.json").exists():
        sys.exit("error: run ./launch.sh demo first; this tokenizes its images with its tokenizer")
    trained, identity = load_tokenizer(DEMO / "tokenizer")
    rows = [
        row("dVAE trained by the demo", trained, views(tuple(identity["input_size"]), identity["filter"])),
        row("DALL-E encoder, random weights", random_dalle(), views((112, 112), "lanczos")[: IMAGES // 4]),
    ]
    notes = [
        f"Share of tokens that differ from float32's, views of {IMAGES} tiles ({IMAGES // 4} for DALL-E). bf16 and "
        "fp16 by autocast. TF32 is computed here as the hardware defines it: the inputs of every product rounded to 10 "
        "mantissa bits, sums in float32. Random weights leave the largest logits closer together than trained ones do. "
        "Tokens are made once and used for hundreds of epochs, so the default is IEEE float32."
    ]
    write("tokenizer_precision", "how many visual tokens does a lower precision change?", rows, {}, notes)


def row(name: str, tokenizer: VisualTokenizer, pixels: Tensor) -> dict:
    device = torch.device("cpu")
    exact = tokenizer.tokenize(pixels)
    assert torch.equal(exact, tokenizer.tokenize(pixels)), "the tokenizer does not repeat itself"
    changed = {}
    with tf32_products(tokenizer):
        changed["TF32"] = tokenizer.tokenize(pixels)
    for precision in ("fp16", "bf16"):
        with autocast_as(precision, device):
            changed[precision] = tokenizer.tokenize(pixels)
    shares = {
        precision: f"{100 * float((tokens != exact).double().mean()):.2f}%" for precision, tokens in changed.items()
    }
    return {"tokenizer": name, "tokens": exact.numel(), **shares}


def views(size: tuple[int, int], resample: str) -> Tensor:
    """Jittered views f32 [IMAGES, 3, H, W] in [0, 1], cut by a tokenizer's filter."""
    images = ImageSet(DEMO / "shards" / "test")
    places = SequentialOrder(images.manifest.counts)
    policy = view_policy(load_config(str(ROOT / "configs" / "demo.yaml"), []).view)
    stream = Stream(images=images, places=places, source=DrawnViews(policy), size=size, resample=resample)
    batch = stream.batch(np.linspace(0, places.samples - 1, IMAGES).astype(np.int64))
    return jitter(batch.pixels, batch.jitters, batch.orders, batch.pivots)


def random_dalle() -> Dalle:
    """Weights as OpenAI's code draws them."""
    dalle = Dalle(DalleShape(has_decoder=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dalle.parameters():
            parameter.zero_()
            if parameter.dim() == 4:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return dalle.eval()


@contextlib.contextmanager
def tf32_products(tokenizer: VisualTokenizer) -> Iterator[None]:
    """Round what every convolution multiplies to TF32, weights included; put the weights back."""
    assert isinstance(tokenizer, nn.Module), "tokenizers are torch modules"
    layers = [layer for layer in tokenizer.modules() if isinstance(layer, nn.Conv2d)]
    before = [layer.weight.data for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for layer in layers]
    for layer in layers:
        layer.weight.data = rounded(layer.weight.data)
    try:
        yield
    finally:
        for layer, weight, hook in zip(layers, before, hooks, strict=True):
            layer.weight.data = weight
            hook.remove()


def rounded(x: Tensor) -> Tensor:
    """float32 rounded to the nearest TF32, ties away from zero."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (_TF32_BITS - 1))) & ~((1 << _TF32_BITS) - 1)).view(torch.float32)


if __name__ == "__main__":
    main()
