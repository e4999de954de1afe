"""The fused jitter against its reference, bit for bit: in Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch

from beitforge.kernels.pixels import jittered
from beitforge.kernels.pixels.reference import ORDERS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images(count: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Random pixels and factors, every order; one image of tied greys, one that nothing changes."""
    generator = torch.Generator().manual_seed(height)
    pixels = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    pixels[0] = pixels[0, :1] // 2 * 2
    factors = 0.4 + 1.2 * torch.rand(count, 3, generator=generator)
    factors[-1] = 1.0
    pivots = (255 * torch.rand(count, generator=generator)).round()
    orders = torch.arange(count) % len(ORDERS)
    return pixels.to(DEVICE), factors.to(DEVICE), orders.to(DEVICE), pivots.to(DEVICE)


@pytest.mark.parametrize("normal", [None, NORMAL], ids=["plain", "normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (33, 31), (32, 64)], ids=str)
def test_the_bits_of_the_reference(size, dtype, normal):
    tensors = images(7, *size)
    ours, theirs = (jittered(*tensors, normal, dtype, name) for name in ("fused", "reference"))
    assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cuts bfloat16 off instead of rounding it: needs a GPU")
def test_the_bits_of_the_reference_in_bfloat16():
    tensors = images(7, 224, 224)
    ours, theirs = (jittered(*tensors, NORMAL, torch.bfloat16, name) for name in ("fused", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.skipif(DEVICE == "cpu", reason="compares a GPU with a CPU")
def test_a_gpu_gives_what_a_cpu_gives():
    tensors = images(7, 224, 224)
    there = jittered(*tensors, NORMAL)
    assert torch.equal(there.cpu(), jittered(*(tensor.cpu() for tensor in tensors), NORMAL))


def test_half_greys_go_to_the_even_number():
    """Where 0.299 R + 0.587 G + 0.114 B is a half, the order of the sum decides what float32 makes of it."""
    levels = torch.arange(256)
    triples = torch.cartesian_prod(levels[::15], levels[::15], levels)
    exact = 299 * triples[:, 0] + 587 * triples[:, 1] + 114 * triples[:, 2]
    ties = triples[exact % 1000 == 500]
    assert len(ties) > 50
    pixels = ties.to(torch.uint8).t().reshape(1, 3, 1, -1).to(DEVICE)
    factors = torch.tensor([[1.0, 1.0, 0.0]], device=DEVICE)  # no saturation: the grey itself
    rest = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.full((1,), 9.0, device=DEVICE)
    ours, theirs = (jittered(pixels, factors, *rest, implementation=name) for name in ("fused", "reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8)], ids=str)
def test_other_pixels_are_refused(pixels):
    rest = torch.ones(1, 3), torch.zeros(1, dtype=torch.long), torch.zeros(1)
    with pytest.raises(ValueError, match="takes uint8"):
        jittered(pixels, *rest)


@pytest.mark.parametrize("normal", [None, NORMAL], ids=["plain", "normalised"])
def test_compiled_without_a_break(normal):
    """torch's own check of the operator; one graph, the same bits; and none of it is autocast's business."""
    from beitforge.kernels.pixels.fused import _jittered

    tensors = images(3, 16, 8)
    torch.library.opcheck(_jittered, (*tensors, *(normal or ((), ())), torch.float32))
    compiled = torch.compile(jittered, fullgraph=True, backend="aot_eager")
    plain = jittered(*tensors, normal, implementation="fused")
    assert torch.equal(compiled(*tensors, normal, implementation="fused"), plain)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(jittered(*tensors, normal, implementation="fused"), plain)
        assert torch.equal(jittered(*tensors, normal, implementation="reference"), plain)
