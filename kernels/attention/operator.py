"""The fused kernels as PyTorch operators: what runs them, their shapes for tracing, and their gradients.

Imported when fused attention is first asked for; needs Triton.
"""

import functools
import math
import os

import torch
from torch import Tensor

from beitforge.kernels.attention import bias_tiles, fused, stored
from beitforge.kernels.attention.block_sizes import Blocks, Plan, choose, padded
from beitforge.kernels.dispatch import interpreted, on_device

REGISTERS = 255  # ptxas gives a kernel that spills far fewer, unless told
_RESIDENT = 2  # programs of a kernel that sums over images which share a multiprocessor
_ROWS = 128  # a program of stored.row_sums takes
_INTERPRETED = interpreted()


def attention_fused(qkv_BS3AK: Tensor, bias_ASS: Tensor | None, packed_AT: Tensor | None) -> Tensor:
    """As attention_reference, with its gradients, by the kernels of `fused`. packed_AT: pack_bias of the bias."""
    if bias_ASS is None:
        packed_AT = None
    elif packed_AT is None:
        packed_AT = pack_bias(bias_ASS, qkv_BS3AK.shape[-1], qkv_BS3AK.dtype)
    return _attention(qkv_BS3AK.contiguous(), bias_ASS, packed_AT)[0]


def pack_bias(bias_ASS: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """The bias as the kernels read it, [A, T]; once for all layers that share it."""
    return _pack(bias_ASS.detach(), head_size, dtype)


def plan_of(device: torch.device, positions: int, head_size: int, dtype: torch.dtype) -> Plan:
    """What the kernels run with on a device. BEITFORGE_BACKWARD=stored asks for the second design of the backward."""
    asked = os.environ.get("BEITFORGE_BACKWARD", "summed")
    if asked not in ("summed", "stored"):
        raise ValueError(f"BEITFORGE_BACKWARD is {asked!r}; it takes summed or stored")
    cuda = device.type == "cuda" and torch.version.hip is None
    capability = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    return choose(capability, positions, head_size, dtype == torch.float32, asked == "stored")


@torch.library.custom_op("beitforge::pack_bias", mutates_args=())
def _pack(bias_ASS: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    plan = plan_of(bias_ASS.device, bias_ASS.shape[1], head_size, dtype)
    return bias_tiles.pack(bias_ASS, plan, head_size**-0.5, _packed(bias_ASS, head_size, dtype)[1])


@_pack.register_fake
def _(bias_ASS: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    shape, kind = _packed(bias_ASS, head_size, dtype)
    return bias_ASS.new_empty(shape, dtype=kind)


def _packed(bias_ASS: Tensor, head_size: int, dtype: torch.dtype) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and type of a packed bias: float16 has three more bits than bfloat16, and a bias never needs the range."""
    heads, positions = bias_ASS.shape[0], int(bias_ASS.shape[1])  # the kernels are compiled for one S
    plan = plan_of(bias_ASS.device, positions, head_size, dtype)
    length = bias_tiles.offsets(positions, plan)[2] + plan.keys_values.size(positions)
    return (heads, length), torch.float32 if dtype == torch.float32 else torch.float16


@torch.library.custom_op("beitforge::attention", mutates_args=())
def _attention(qkv: Tensor, bias: Tensor | None, packed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, S, A, K] and the log2 of each row's sum of exponentials, float32 [B, A, S]."""
    images, positions, _, heads, size = qkv.shape
    plan = plan_of(qkv.device, positions, size, qkv.dtype)
    if bias is not None and packed is not None and (packed.shape, packed.dtype) != _packed(bias, size, qkv.dtype):
        raise ValueError(f"the bias was packed for another type or head size than qkv's {qkv.dtype} and {size}")
    out, lse = (
        qkv.new_empty(images, positions, heads, size),
        qkv.new_empty(images, heads, positions, dtype=torch.float32),
    )
    blocks = plan.forward
    grid = (-(-positions // blocks.rows) * images * heads,)
    read, per_head = (qkv, 0) if packed is None else (packed, packed.shape[1])
    with on_device(qkv):
        fused.forward[grid](
            qkv, read, out, lse, images, per_head, size**-0.5 * math.log2(math.e),
            *_shape(qkv, blocks), packed is not None, _up(qkv), blocks.stages, **_options(blocks),
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, packed: Tensor | None) -> tuple[Tensor, Tensor]:
    images, positions, _, heads, size = qkv.shape
    lse = qkv.new_empty(images, heads, positions, dtype=torch.float32)
    return qkv.new_empty(images, positions, heads, size), lse


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=32)
def images_of_program(images: int, programs_of_image: int, places: int) -> int:
    """Of how many images a program sums, so that programs fill the chip's places in the least time.

    Time is the rounds of programs × (images of one + 1, for its start and its partial sums).
    """

    def time(chunk: int) -> int:
        programs = -(-images // chunk) * programs_of_image
        return -(-programs // places) * (chunk + 1)

    return min(range(images, 0, -1), key=time)


@torch.library.custom_op("beitforge::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packed: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, and of the bias, float32 [A, S, S] (empty unless needs_bias)."""
    _, positions, _, _, size = qkv.shape
    plan = plan_of(qkv.device, positions, size, qkv.dtype)
    with on_device(qkv):
        if plan.stored is not None:
            return _backward_stored(dout, qkv, out, lse, packed, needs_bias, plan, plan.stored)
        return _backward_summed(dout, qkv, out, lse, packed, needs_bias, plan)


def _backward_summed(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packed: Tensor | None, needs_bias: bool, plan: Plan
) -> tuple[Tensor, Tensor]:
    """As _backward, by the first design: the query kernel sums the bias gradient, or a kernel of its own does."""
    images, positions, _, heads, size = qkv.shape
    at_queries = bias_tiles.offsets(positions, plan)[1]
    to_log2, scale = size**-0.5 * math.log2(math.e), size**-0.5
    read, per_head = (qkv, 0) if packed is None else (packed[:, at_queries:], packed.shape[1])
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    held = plan.held and needs_bias
    blocks = plan.queries
    rows = -(-positions // blocks.rows)
    chunk = images_of_program(images, rows * heads, _RESIDENT * multiprocessors(qkv.device))
    chunks = -(-images // chunk)
    partial = lse.new_empty((chunks, heads, blocks.size(positions)) if needs_bias else (0,))
    fused.backward_queries[(rows, heads, chunks)](
        qkv, out, dout, dqkv, read, lse, delta, partial if held else lse, images, chunk, per_head, 0, to_log2, scale,
        *_shape(qkv, blocks), packed is not None, held, _up(qkv), blocks.stages, **_options(blocks),
    )  # fmt: skip
    _keys_and_values(dout, qkv, dqkv, lse, delta, packed, None, plan)
    if needs_bias and not held:
        _bias_sums(qkv, dout, read, lse, delta, partial, chunk, per_head, to_log2, plan)
    return dqkv, bias_tiles.unpack(partial, positions, blocks) if needs_bias else lse.new_empty(0)


def _backward_stored(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packed: Tensor | None, needs_bias: bool, plan: Plan,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As _backward, by the second design, `stored`. blocks: of its query kernel."""
    images, positions, _, heads, size = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    count = images * positions * heads
    stored.row_sums[(-(-count // _ROWS),)](out, dout, delta, count, positions, heads, size, padded(size), _ROWS)
    height, width = plan.keys_values.padded(positions)
    scores = qkv.new_empty(images, heads, height, width)
    _keys_and_values(dout, qkv, dqkv, lse, delta, packed, scores, plan)
    held = plan.held and needs_bias
    rows = -(-positions // blocks.rows)
    chunk = images_of_program(images, rows * heads, _RESIDENT * multiprocessors(qkv.device))
    chunks = -(-images // chunk)
    partial = lse.new_empty((chunks, heads, height, width) if held else (0,))
    stored.queries[(rows, heads, chunks)](
        scores, qkv, dqkv, partial, images, chunk, size**-0.5,
        *_shape(qkv, blocks)[:-1], height, width, held, _up(qkv), blocks.stages, **_options(blocks),
    )  # fmt: skip
    if not needs_bias:
        return dqkv, lse.new_empty(0)
    total = partial.sum(dim=0) if held else scores.sum(dim=0, dtype=torch.float32)
    return dqkv, total[:, :positions, :positions].transpose(1, 2).contiguous()


def _keys_and_values(
    dout: Tensor, qkv: Tensor, dqkv: Tensor, lse: Tensor, delta: Tensor, packed: Tensor | None, scores: Tensor | None,
    plan: Plan,
) -> None:  # fmt: skip
    """Their gradients, to dqkv, and those of the scores, if there is a place for them."""
    images, positions, _, heads, size = qkv.shape
    blocks = plan.keys_values
    at_keys = bias_tiles.offsets(positions, plan)[2]
    read, per_head = (qkv, 0) if packed is None else (packed[:, at_keys:], packed.shape[1])
    fused.backward_keys_values[(-(-positions // blocks.rows) * images * heads,)](
        qkv, dout, dqkv, read, lse, delta, dqkv if scores is None else scores, images, per_head,
        size**-0.5 * math.log2(math.e), size**-0.5,
        *_shape(qkv, blocks), packed is not None, scores is not None, _up(qkv), blocks.stages, **_options(blocks),
    )  # fmt: skip


def _bias_sums(
    qkv: Tensor, dout: Tensor, read: Tensor, lse: Tensor, delta: Tensor, partial: Tensor,
    chunk: int, per_head: int, to_log2: float, plan: Plan,
) -> None:  # fmt: skip
    """The partial sums of the bias gradient, whole blocks of columns and then the last, padded one."""
    images, positions, _, heads, _ = qkv.shape
    blocks = plan.queries
    full, rest = blocks.split(positions)
    rows = -(-positions // blocks.rows)
    for first, count, width in ((0, full, blocks.columns), (full, 1, rest)):
        if count and width:
            fused.backward_bias[(rows * count, heads, partial.shape[0])](
                qkv, dout, read, lse, delta, partial, images, chunk, per_head, to_log2,
                *_shape(qkv, blocks), width, first, _up(qkv), blocks.stages, **_options(blocks),
            )  # fmt: skip


@_backward.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packed: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    positions, heads = qkv.shape[1], qkv.shape[3]
    return torch.empty_like(qkv), lse.new_empty((heads, positions, positions) if needs_bias else (0,))


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    qkv, bias, packed = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, packed)
    ctx.biased = bias is not None  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: torch.autograd.function.FunctionCtx, dout: Tensor, _: Tensor | None) -> tuple:
    qkv, out, lse, packed = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_bias = ctx.biased and ctx.needs_input_grad[1]  # type: ignore[attr-defined]
    dqkv, dbias = _backward(dout.contiguous(), qkv, out, lse, packed, needs_bias)
    return dqkv, dbias if needs_bias else None, None


_attention.register_autograd(_gradients, setup_context=_remember)


def _shape(qkv: Tensor, blocks: Blocks) -> tuple[int, int, int, int, int, int, int]:
    """The constants every kernel takes: S, A, K, KP, BM, BN, BR."""
    _, positions, _, heads, size = qkv.shape
    return positions, heads, size, padded(size), blocks.rows, blocks.columns, blocks.split(positions)[1]


def _up(qkv: Tensor) -> bool:
    return _INTERPRETED and qkv.dtype == torch.bfloat16


def _options(blocks: Blocks) -> dict[str, int]:
    if _INTERPRETED:
        return {}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return options if torch.version.hip else {**options, "maxnreg": REGISTERS}
