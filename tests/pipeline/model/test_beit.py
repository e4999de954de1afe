"""The encoder: the released forward pass written out a second time, and what training leaves out or keeps."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from beitforge.kernels.attention import relative_index
from beitforge.pipeline.config.fields import Size
from beitforge.pipeline.config.settings import Config, Model
from beitforge.pipeline.model.beit import Beit
from beitforge.pipeline.plan.costs import training_flops

TINY = Model(input_size=Size(12, 12), patch_size=3, layers=3, width=24, heads=2, drop_path=0.0)
VOCABULARY, MASKED = 40, 6
N = 16
MODES = ["absolute", "relative_shared", "relative"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes) -> Beit:
    """A tiny encoder whose bias tables and biases are not zero, so that they matter."""
    beit = Beit(Model(**{**TINY.__dict__, **changes}), VOCABULARY, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in beit.named_parameters():
            if name.rsplit(".", 1)[-1] in ("bias", "q_bias", "v_bias", "table"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() > 1:
                parameter.mul_(8)  # so that attention is not the same everywhere
    return beit


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, 12, 12] and masks [B, 16] of exactly MASKED patches."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(count, 3, 12, 12, generator=generator)
    mask = torch.rand(count, N, generator=generator).argsort(dim=1) < MASKED
    return pixels, mask


@pytest.mark.parametrize("changes", [{}, {"layers": 1, "mlp_ratio": 3.0, "heads": 3}])
def test_training_flops_are_three_forwards(changes):
    """Against PyTorch's own count of the matrix products of a forward pass, the last block whole, the head on masked
    patches; and how many of them training leaves out in the last block."""
    beit = tiny(kernels="reference", positions="absolute", **changes)
    pixels, mask = inputs(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        beit.hidden(pixels, mask)
    head = 2 * MASKED * beit.model.width * VOCABULARY
    assert training_flops(beit.model, VOCABULARY, MASKED) == 3 * (counter.get_total_flops() + head)
    with FlopCounterMode(display=False) as less, torch.no_grad():
        beit(pixels, mask, MASKED)
    unseen = beit.model.num_patches + 1 - MASKED
    saved = 2 * unseen * beit.model.width**2 * (1 + 2 * beit.model.mlp_ratio)  # projection and MLP
    assert counter.get_total_flops() + head - less.get_total_flops() == saved


def released(beit: Beit, pixels: Tensor, mask: Tensor) -> Tensor:
    """BEiT's released VisionTransformerForMaskedImageModeling in float64, from this model's weights: the logits of the
    masked patches, [masked patches of all images, V]."""
    w = {name: parameter.detach().double() for name, parameter in beit.named_parameters()}
    model = beit.model
    d, heads, size = model.width, model.heads, model.patch_size
    kernel = w["patch_embedding.weight"].view(d, 3, size, size)
    x = F.conv2d(pixels.double(), kernel, w["patch_embedding.bias"], stride=size).flatten(2).transpose(1, 2)
    b, n, _ = x.shape
    chosen = mask.unsqueeze(-1).double()
    x = x * (1 - chosen) + w["mask_embedding"].expand(b, n, -1) * chosen
    x = torch.cat([w["cls_embedding"].expand(b, -1, -1), x], dim=1)
    if model.positions == "absolute":
        x = x + w["position_embedding"]
    index = relative_index(*model.grid)
    for layer in range(model.layers):
        part = {name.removeprefix(f"blocks.{layer}."): value for name, value in w.items() if f"blocks.{layer}." in name}
        y = F.layer_norm(x, (d,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        qkv_bias = torch.cat([part["attention.q_bias"], torch.zeros(d, dtype=torch.double), part["attention.v_bias"]])
        qkv = F.linear(y, part["attention.qkv_weight"], qkv_bias).reshape(b, n + 1, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (d // heads) ** -0.5, qkv[1], qkv[2]
        logits = q @ k.transpose(-2, -1)
        table = {"relative_shared": w.get("shared_bias.table"), "relative": part.get("attention.own_bias.table")}
        if table.get(model.positions) is not None:
            bias = table[model.positions][index.view(-1)].view(n + 1, n + 1, -1)
            logits = logits + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        y = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n + 1, d)
        y = F.linear(y, part["attention.out.weight"], part["attention.out.bias"])
        x = x + (part["gamma1"] * y if model.layer_scale else y)
        y = F.layer_norm(x, (d,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, part["fc1.weight"], part["fc1.bias"])), part["fc2.weight"], part["fc2.bias"])
        x = x + (part["gamma2"] * y if model.layer_scale else y)
    x = F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"], 1e-6)
    return F.linear(x[:, 1:][mask], w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("positions", MODES)
def test_forward_is_the_released_one(positions, layer_scale, kernels):
    """All three position modes, with and without layer scale, against the second writing in float64."""
    beit = tiny(positions=positions, layer_scale=layer_scale, kernels=kernels)
    pixels, mask = inputs()
    logits, index, weight = beit(pixels, mask, MASKED)
    assert logits.shape == (3, MASKED, VOCABULARY)
    assert (weight == 1).all()
    assert index.tolist() == [row.nonzero().flatten().tolist() for row in mask]
    expected = released(beit, pixels, mask).view(3, MASKED, VOCABULARY)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert expected.std() > 0.1


def test_masked_pixels_are_not_seen():
    """Changing the pixels of masked patches changes no logit; the gradient to them is zero, that to others is not."""
    beit = tiny()
    pixels, mask = inputs()
    cover = mask.view(3, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3).expand_as(pixels)
    pixels.requires_grad_()
    logits, _, _ = beit(pixels, mask, MASKED)
    changed, _, _ = beit(torch.where(cover, torch.full_like(pixels, 9.0), pixels), mask, MASKED)
    assert torch.equal(logits, changed)
    (gradient,) = torch.autograd.grad(logits.square().sum(), pixels)
    assert (gradient[cover] == 0).all()
    assert (gradient[~cover] != 0).float().mean() > 0.99


def test_the_mask_embedding_comes_before_positions():
    """Two masked patches have the same content and differ by their positions: embed(…) - positions is the mask
    embedding there, the patch embedding elsewhere, and [S] in front."""
    beit = tiny(positions="absolute")
    pixels, mask = inputs()
    assert beit.position_embedding is not None
    content = beit.embed(pixels, mask) - beit.position_embedding
    plain = beit.embed(pixels, None) - beit.position_embedding
    torch.testing.assert_close(content[:, 1:][mask], beit.mask_embedding[0].expand(int(mask.sum()), -1))
    torch.testing.assert_close(content[:, 1:][~mask], plain[:, 1:][~mask])
    torch.testing.assert_close(content[:, 0], beit.cls_embedding[0].expand(3, -1))


@pytest.mark.parametrize("positions", MODES)
def test_positions_matter(positions):
    """Without them a vision transformer cannot tell one masked patch of an image from another."""
    beit = tiny(positions=positions)
    pixels, mask = inputs(1)
    with torch.no_grad():
        logits, _, _ = beit(pixels, mask, MASKED)
        assert (logits[0] - logits[0, :1]).abs()[1:].amax(dim=1).min() > 1e-3
        for name, parameter in beit.named_parameters():
            if name.endswith(("table", "position_embedding")):
                parameter.zero_()
        logits, _, _ = beit(pixels, mask, MASKED)
        torch.testing.assert_close(logits[0], logits[0, :1].expand(MASKED, -1))


def test_short_masks_are_weighted():
    """Fewer masked patches than M (masks as published): their logits come first, what fills up weighs nothing."""
    beit = tiny()
    pixels, mask = inputs()
    mask[0] = False
    mask[1, mask[1].nonzero().flatten()[2:]] = False
    logits, index, weight = beit(pixels, mask, MASKED)
    assert weight.sum(dim=1).tolist() == [0, 2, 6]
    assert index[1, :2].tolist() == mask[1].nonzero().flatten().tolist()
    assert weight[1].tolist() == [1, 1, 0, 0, 0, 0]
    assert all(len(set(row)) == MASKED for row in index.tolist())
    alone, _, _ = beit(pixels[1:2], mask[1:2], MASKED)
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    beit = tiny()
    pixels, mask = inputs(5)
    together, _, _ = beit(pixels, mask, MASKED)
    for i in range(5):
        alone, _, _ = beit(pixels[i : i + 1], mask[i : i + 1], MASKED)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_drop_path_keeping_all_is_scaled():
    """keep = 1 everywhere multiplies branch l by 1 / (1 - p·l/(L-1)); without drop path keep is not even read."""
    pixels, mask = inputs()
    keep = torch.ones(3, 3, 2, dtype=torch.bool)
    plain = tiny()
    assert torch.equal(plain(pixels, mask, MASKED, keep)[0], plain(pixels, mask, MASKED)[0])
    dropping = tiny(drop_path=0.5)
    with torch.no_grad():
        for layer, block in enumerate(plain.blocks):
            for gamma in (block.gamma1, block.gamma2):
                gamma.div_(1 - 0.5 * layer / 2)
    torch.testing.assert_close(dropping(pixels, mask, MASKED, keep)[0], plain(pixels, mask, MASKED)[0])
    assert not torch.equal(dropping(pixels, mask, MASKED, keep)[0], dropping(pixels, mask, MASKED)[0])


def test_drop_path_drops_one_branch_of_one_image():
    """keep = 0 for (image, layer, branch) is that image with γ of that branch at zero; the others do not notice."""
    pixels, mask = inputs()
    keep = torch.ones(3, 3, 2, dtype=torch.bool)
    keep[1, 2, 0] = False
    beit = tiny(drop_path=0.25)
    dropped, _, _ = beit(pixels, mask, MASKED, keep)
    all_kept, _, _ = beit(pixels, mask, MASKED, torch.ones_like(keep))
    assert torch.equal(dropped[[0, 2]], all_kept[[0, 2]])
    with torch.no_grad():
        beit.blocks[2].gamma1.zero_()  # type: ignore[union-attr, operator]
    without, _, _ = beit(pixels, mask, MASKED, torch.ones_like(keep))
    torch.testing.assert_close(dropped[1], without[1])
    assert (dropped[1] - all_kept[1]).abs().max() > 1e-3


def test_hidden_states_of_every_layer():
    """After the embedding and after each block; the last is what forward reads."""
    beit = tiny()
    pixels, mask = inputs()
    states = beit.hidden(pixels, mask, every=True)
    assert len(states) == 4
    assert all(state.shape == (3, N + 1, 24) for state in states)
    assert torch.equal(states[0], beit.embed(pixels, mask))
    (last,) = beit.hidden(pixels, mask)
    assert torch.equal(states[-1], last)
    picked = beit.head(beit.norm(last[:, 1:][mask])).view(3, MASKED, VOCABULARY)
    torch.testing.assert_close(beit(pixels, mask, MASKED)[0], picked)
    assert not torch.equal(beit.hidden(pixels, None)[0], last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["sdpa", "reference"])
@pytest.mark.parametrize("positions", MODES)
def test_selective_checkpointing_changes_no_bit(positions, kernels, dtype):
    """The same logits and the same gradient of every parameter, to the last bit, drop path included; products are not
    computed again."""
    pixels, mask = inputs()
    keep = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(3)) > 0.3
    found = []
    for checkpointing in ("none", "selective"):
        beit = tiny(positions=positions, drop_path=0.3, kernels=kernels).to(dtype)
        beit.checkpointing = checkpointing
        logits, _, _ = beit(pixels.to(dtype), mask, MASKED, keep)
        with Operators() as ran:
            logits.float().square().mean().backward()
        found.append((logits, {name: parameter.grad for name, parameter in beit.named_parameters()}, ran.counts))
    (plain, gradients, once), (again, repeated, more) = found
    assert torch.equal(plain, again)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, repeated[name]), name
    assert all(more[product] == once[product] for product in ("aten::mm", "aten::addmm"))
    assert more["aten::gelu"] == 3 and more["aten::native_layer_norm"] == 6 and once["aten::gelu"] == 0


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", MODES)
def test_full_checkpointing_changes_nothing(positions):
    """Same logits and the same gradient of every parameter, drop path included."""
    pixels, mask = inputs()
    keep = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(3)) > 0.3
    found = []
    for checkpointing in ("none", "full"):
        beit = tiny(positions=positions, drop_path=0.3)
        beit.checkpointing = checkpointing
        logits, _, _ = beit(pixels, mask, MASKED, keep)
        logits.square().mean().backward()
        found.append((logits, {name: parameter.grad for name, parameter in beit.named_parameters()}))
    torch.testing.assert_close(
        found[0][0], found[1][0]
    )  # not bitwise: sdpa has another kernel where no gradient is asked
    for name, gradient in found[0][1].items():
        assert gradient is not None, name
        torch.testing.assert_close(found[1][1][name], gradient, msg=name)
        assert gradient.abs().max() > 0, name


def test_checkpointing_saves_activations():
    """The blocks' insides are computed twice: more operators in the backward pass."""
    pixels, mask = inputs()
    flops = []
    for checkpointing in ("none", "full"):
        beit = tiny(kernels="reference")
        beit.checkpointing = checkpointing
        with FlopCounterMode(display=False) as counter:
            beit(pixels, mask, MASKED)[0].sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] > 1.2 * flops[0]


def test_bfloat16_runs_and_is_near():
    """As under DeepSpeed: weights and pixels in bfloat16, everything else follows."""
    beit = Beit(TINY, VOCABULARY, seed=1)
    pixels, mask = inputs()
    keep = torch.ones(3, 3, 2, dtype=torch.bool)
    exact, _, _ = beit(pixels, mask, MASKED, keep)
    logits, _, _ = beit.bfloat16()(pixels.bfloat16(), mask, MASKED, keep)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.01)


def test_the_index_is_not_saved():
    """Checkpoints and exports hold weights; the relative index is computed again."""
    beit = tiny(positions="relative")
    assert set(beit.state_dict()) == {name for name, _ in beit.named_parameters()}


def test_the_default_config_is_base():
    assert Config().model == Model(layers=12, width=768, heads=12, positions="relative_shared", layer_scale_init=0.1)


@pytest.mark.parametrize("positions", ["absolute", "relative_shared", "relative"])
def test_the_last_block_computes_masked_patches_only(positions):
    """Exactly the logits and gradients of all patches, picked afterwards: in float64 to its last digits."""
    model = dataclasses.replace(TINY, positions=positions)
    beit = Beit(model, 11, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in beit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    pixels = torch.randn(3, 3, *model.input_size, generator=generator).double()
    mask = torch.rand(3, model.num_patches, generator=generator).argsort(dim=1) < 4
    found = []
    for picked in (True, False):
        beit.zero_grad()
        logits, index, _ = beit(pixels, mask, 4)
        if not picked:
            everywhere = beit.all_logits(pixels, mask)
            logits = everywhere.gather(1, index[..., None].expand(-1, -1, 11))
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in beit.parameters())])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
