"""One full training step: ours beside transformers', timm's and the released code's BEiT, eager and compiled.

    python -m benchmarks.training.train                        # on a GPU; some minutes
    python -m benchmarks.training.train --sizes base --minutes 3 --out DIR
    python -m benchmarks.training.train --dry                  # tiny models on a CPU: every step runs and learns

Forward, loss on the masked patches, backward, clipping, AdamW, all in weights of one type on the same batch, without
loader, tokenizer or DeepSpeed.
"""

import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Model
from beitforge.pipeline.plan.costs import training_flops
from benchmarks.harness import Bench, Job, Row, Wrong, measured, options
from benchmarks.training.contenders import CONTENDERS, Contender, V

_BASE, _LARGE = Model(drop_path=0.0), Model(layers=24, width=1024, heads=16, drop_path=0.0)
_TINY = Model(input_size=Size(64, 64), layers=2, width=48, heads=3, drop_path=0.0)
# model, images, masked patches an image; seconds of a row on a GPU, eager and compiled ahead
SIZES = {
    "base": (_BASE, 128, 75, 3.0, 12.0),
    "large": (_LARGE, 64, 75, 5.0, 18.0),
    "dry": (_TINY, 2, 5, 1.0, 1.0),
}
QUESTION = "one training step on one GPU"
_FINDS = ("ms", "images/s", "MFU", "memory")
_PEERS = ("ours", "transformers", "timm", "unilm's arithmetic")


def batch(model: Model, images: int, masked: int, bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """pixels, mask and tokens of the masked patches."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *model.input_size, generator=generator).to(bench.device, bench.dtype)
    mask = torch.rand(images, model.num_patches, generator=generator).argsort(dim=1) < masked
    tokens = torch.randint(V, (images * masked,), generator=generator)
    return pixels, mask.to(bench.device), tokens.to(bench.device)


def contender(name: str, size: str, bench: Bench) -> Contender:
    """On the device, in its type; from one seed."""
    model, _, masked, *_ = SIZES[size]
    torch.manual_seed(0)
    made = CONTENDERS[name](model, masked)
    made.module.to(bench.device, bench.dtype)
    return made


def stepper(made: Contender, tensors: tuple[Tensor, ...], compiled: bool, bench: Bench) -> Callable[[], Tensor]:
    """One whole step; returns the loss."""
    parameters = list(made.module.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)
    loss_of = bench.compile(made.loss) if compiled else made.loss

    def step() -> Tensor:
        loss = loss_of(*tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        adamw.step()
        adamw.zero_grad()
        return loss.detach()

    return step


def check(step: Callable[[], Tensor]) -> None:
    """A step starts near ln V and learns its batch. Raises Wrong."""
    first = float(step())
    if not abs(first / math.log(V) - 1) < 0.05:
        raise Wrong(f"starts at a loss of {first:.3f}")
    last = [float(step()) for _ in range(3)][-1]
    if not last < first:
        raise Wrong(f"does not learn: {first:.3f}, then {last:.3f}")


def measure(size: str, name: str, compiled: bool, bench: Bench) -> Row:
    """Right first, then time, memory and the share of what a large product reached."""
    model, images, masked, *_ = SIZES[size]
    step = stepper(contender(name, size, bench), batch(model, images, masked, bench), compiled, bench)
    check(step)
    memory = bench.memory(step)
    held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    times = bench.time(step, milliseconds=1000)
    flops = images * training_flops(model, V, masked)
    if math.isnan(times.median):
        return {"ms": times.cell(), "images/s": "", "MFU": "", "memory": ""}
    product = bench.rates()[1]
    mfu = f"{flops / times.median * 1e3 / product:.1%}" if product == product else ""
    gib = f"{(memory + held) / 2**30:.1f} GiB" if held else ""
    speed = f"{1e3 * images / times.median:.0f}"
    return {"ms": times.cell(), "images/s": speed, "MFU": mfu, "memory": gib, "_ms": times.median}


def jobs(sizes: tuple[str, ...], brief: bool = False) -> list[Job]:
    """A row for each size and step, the most telling first: what is compiled, then, unless brief, as it is written."""
    found = []
    for size in sizes:
        _, _, _, eager, ahead = SIZES[size]
        steps = [(name, True) for name in _PEERS]
        steps += [] if brief else [*((name, False) for name in _PEERS), ("ours, SDPA", True)]
        for name, compiled in steps:
            known = {"model": size, "step": f"{name}{', compiled' if compiled else ''}"}
            seconds = ahead if compiled else eager
            found.append(Job(known, _FINDS, seconds, partial(measure, size, name, compiled), compiled))
    return found


def ratios(rows: list[Row]) -> dict[str, float]:
    """The fastest peer's time over ours, by model."""
    found: dict[str, float] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model and "_ms" in row]
        times = {str(row["step"]): float(row["_ms"]) for row in here}  # type: ignore[arg-type]
        ours = [time for step, time in times.items() if step.startswith("ours")]
        peers = [time for step, time in times.items() if not step.startswith("ours")]
        if ours and peers:
            found[f"{model}: fastest peer / ours"] = min(peers) / min(ours)
    return found


def note(bench: Bench) -> str:
    product = bench.rates()[1]
    sizes = ", ".join(f"{name} {images} images" for name, (_, images, *_) in SIZES.items() if name != "dry")
    return (
        f"A whole step in {str(bench.dtype).removeprefix('torch.')} without loader and DeepSpeed, {sizes}; median and "
        f"the fifths at either end. MFU against the {product / 1e12:.0f} TFLOP/s that a large product reached on this "
        "chip; operations as docs/recipe.md counts them, the last block whole. unilm's arithmetic: the released code's "
        "blocks, written out."
    )


def main() -> None:
    """The table."""
    asked = options("train", tuple(SIZES)[:-1], sys.argv[1:])
    list(measured("train", QUESTION, jobs(asked.sizes), asked, ratios, note(asked.bench)))


if __name__ == "__main__":
    main()
