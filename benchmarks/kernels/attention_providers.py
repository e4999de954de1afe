"""Ways to compute attention with a learned bias: ours, PyTorch's, and the strongest of other libraries.

Each is built when its row is measured; one that is not installed, or does not run here, raises, and its row says why.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from beitforge.kernels.attention import attention, expand_bias, pack, relative_index
from beitforge.kernels.attention.reference import attention_reference
from benchmarks.harness import Bench

Run = Callable[[Tensor, Tensor], Tensor]  # qkv [B, S, 3, A, K] and table [R, A] to [B, S, A, K]
GRADIENT, DETACHED, NONE = "with its gradient", "no gradient", "no bias"
DENSE = "dense, with its gradient"  # made once for all layers, as a model does: expanding it and its sum are not timed


@dataclass(frozen=True)
class Shape:
    """B images of a grid of patches and [S], A heads of K."""

    name: str
    images: int
    grid: tuple[int, int]
    heads: int
    head_size: int

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1] + 1

    @property
    def flops(self) -> float:
        """Of the forward's two products; the backward has five."""
        return 4.0 * self.images * self.heads * self.positions**2 * self.head_size

    @property
    def bytes(self) -> float:
        """What the forward must read and write in 16 bits; forward and backward together three times as much."""
        return 2.0 * 4 * self.images * self.positions * self.heads * self.head_size

    def index(self, device: torch.device) -> Tensor:
        return relative_index(*self.grid).to(device)


@dataclass(frozen=True)
class Provider:
    """One way to compute it. bias: GRADIENT, DETACHED or NONE. seconds: about what its row takes on a GPU. stored: by
    our second design of the backward."""

    name: str
    bias: str
    build: Callable[[Shape, Bench], Run]
    seconds: float = 2.0
    compiles: bool = False
    stored: bool = False


def ours(shape: Shape, bench: Bench) -> Run:
    index = shape.index(bench.device)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        bias = expand_bias(table, index)
        return attention(qkv, bias, pack(bias, shape.head_size, qkv.dtype, "fused"), "fused")

    return run


@contextlib.contextmanager
def design(stored: bool) -> Iterator[None]:
    """Which backward of ours runs meanwhile."""
    with patch.dict(os.environ, {"BEITFORGE_BACKWARD": "stored" if stored else "summed"}):
        yield


def one_layer(fused: bool) -> Callable[[Shape, Bench], Run]:
    """Ours, or PyTorch's efficient one, as a layer of many calls it: the bias is there, its gradient is made."""

    def build(shape: Shape, bench: Bench) -> Run:
        index = shape.index(bench.device)
        made: list[Any] = []

        def run(qkv: Tensor, table: Tensor) -> Tensor:
            if not made:
                bias = expand_bias(table.detach(), index).to(torch.float32 if fused else qkv.dtype).requires_grad_()
                made.extend((bias, pack(bias, shape.head_size, qkv.dtype, "fused") if fused else None))
            bias, packed = made
            bias.grad = None
            if fused:
                return attention(qkv, bias, packed, "fused")
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                return scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2)

        return run

    return build


def sdpa(backend: SDPBackend, bias: str) -> Callable[[Shape, Bench], Run]:
    """PyTorch's, by one of its backends."""

    def build(shape: Shape, bench: Bench) -> Run:
        index = shape.index(bench.device)

        def run(qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mask = None
            if bias != NONE:
                mask = expand_bias(table if bias == GRADIENT else table.detach(), index).to(q.dtype)[None]
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return run

    return build


def eager(shape: Shape, bench: Bench) -> Run:
    index = shape.index(bench.device)
    return lambda qkv, table: attention_reference(qkv, expand_bias(table, index))


def eager_compiled(shape: Shape, bench: Bench) -> Run:
    return bench.compile(eager(shape, bench))


def flex(capture: str) -> Callable[[Shape, Bench], Run]:
    """FlexAttention that reads the table itself, or the expanded bias."""

    def build(shape: Shape, bench: Bench) -> Run:
        from torch.nn.attention.flex_attention import flex_attention

        index = shape.index(bench.device)

        def run(qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            dense = expand_bias(table, index)

            def of_table(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + table[index[i, j], h]

            def of_dense(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return score + dense[h, i, j]

            found = flex_attention(q, k, v, score_mod=of_table if capture == "table" else of_dense)
            assert isinstance(found, Tensor), "flex_attention gives one tensor unless asked for more"
            return found.transpose(1, 2)

        return bench.compile(run) if bench.device.type == "cuda" else run

    return build


def evoformer(shape: Shape, bench: Bench) -> Run:
    """DeepSpeed4Science's, whose bias gradient is summed by atomics; DeepSpeed compiles it, with nvcc and CUTLASS."""
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    index = shape.index(bench.device)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        bias = expand_bias(table, index).to(qkv.dtype)[None, None]
        q, k, v = (part[None] for part in qkv.unbind(2))  # one "sequence" whose images share the second bias
        return DS4Sci_EvoformerAttention(q, k, v, [None, bias])[0]

    return run


def transformer_engine(shape: Shape, bench: Bench) -> Run:
    """TransformerEngine's fused attention by cuDNN, the bias added after the scale."""
    os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(shape.heads, shape.head_size, attn_mask_type="no_mask", qkv_format="bshd")
    index = shape.index(bench.device)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        bias = expand_bias(table, index).to(qkv.dtype)[None]
        named = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
        return module(*qkv.unbind(2), **named).view(*qkv.shape[:2], shape.heads, shape.head_size)

    return run


def cudnn_graph(shape: Shape, bench: Bench) -> Run:
    """cuDNN's own graph with the bias added after the scale and its gradient, which TransformerEngine calls, too."""
    import cudnn  # nvidia-cudnn-frontend; needs the libcudnn that torch brings

    graphs: dict[str, Any] = {}
    index = shape.index(bench.device)

    class Biased(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
            if not graphs:
                graphs.update(_cudnn_graphs(cudnn, qkv, bias))
            out = qkv.new_empty(qkv.shape[:2] + qkv.shape[3:])
            stats = qkv.new_empty(qkv.shape[0], shape.heads, shape.positions, 1, dtype=torch.float32)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            graphs["forward"]((q, k, v, bias, out.transpose(1, 2), stats))
            ctx.save_for_backward(qkv, bias, out, stats)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
            qkv, bias, out, stats = ctx.saved_tensors
            dqkv, dbias = torch.empty_like(qkv), torch.zeros_like(bias)
            inputs = (*qkv.permute(2, 0, 3, 1, 4).unbind(0), bias, out.transpose(1, 2), stats)
            gradients = (dout.contiguous().transpose(1, 2), *dqkv.permute(2, 0, 3, 1, 4).unbind(0), dbias)
            graphs["backward"]((*inputs, *gradients))
            return dqkv, dbias

    return lambda qkv, table: Biased.apply(qkv, expand_bias(table, index).to(qkv.dtype)[None])


def _cudnn_graphs(cudnn: Any, qkv: Tensor, bias: Tensor) -> dict[str, Callable[[tuple[Tensor, ...]], None]]:
    """The two graphs for tensors like these, as calls with q, k, v, bias, out, stats, then dout, dq, dk, dv, dbias."""
    kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
    io, full, scale = kinds[qkv.dtype], cudnn.data_type.FLOAT, qkv.shape[-1] ** -0.5
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = qkv.new_empty(qkv.shape[:2] + qkv.shape[3:]).transpose(1, 2)

    def start() -> tuple[Any, list[Any]]:
        graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=full, compute_data_type=full, handle=handle)
        return graph, [graph.tensor_like(tensor.detach()) for tensor in (q, k, v, bias)]

    def whole(graph: Any, places: list[Any]) -> Callable[[tuple[Tensor, ...]], None]:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(max(1, graph.get_workspace_size()), device=qkv.device, dtype=torch.uint8)
        return lambda tensors: graph.execute(dict(zip(places, tensors, strict=True)), workspace, handle=handle)

    graph, inputs = start()
    o, stats = graph.sdpa(q=inputs[0], k=inputs[1], v=inputs[2], bias=inputs[3], attn_scale=scale, generate_stats=True)
    o.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    stats.set_output(True).set_data_type(full)
    forward = whole(graph, [*inputs, o, stats])
    graph, inputs = start()
    o, do = graph.tensor_like(out), graph.tensor_like(out)
    rows = qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], 1, dtype=torch.float32)
    stats, dbias = graph.tensor_like(rows), graph.tensor_like(bias.detach())
    named = {"dO": do, "stats": stats, "attn_scale": scale, "bias": inputs[3], "dBias": dbias}
    gradients = graph.sdpa_backward(q=inputs[0], k=inputs[1], v=inputs[2], o=o, **named)
    for gradient, like in zip(gradients, (q, k, v), strict=True):
        gradient.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
    return {"forward": forward, "backward": whole(graph, [*inputs, o, stats, do, *gradients, dbias])}


def flash_bias(shape: Shape, bench: Bench) -> Run:
    """FlashBias (Wu et al. 2025, arXiv 2505.12044, section 3): the bias as a product of two factors of low rank, from
    its singular values, which lengthen queries and keys, so that attention without a bias computes it. Factors are
    made once and have no gradient; a bias of full rank, as here, is cut."""
    index, size = shape.index(bench.device), shape.head_size
    rank = (64 if size <= 64 else 128) * 2 - size
    factors: list[Tensor] = []

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if not factors:
            of_rows, values, of_columns = torch.linalg.svd(expand_bias(table.detach(), index), full_matrices=False)
            root = values[:, None, :rank].sqrt()
            factors.append((of_rows[..., :rank] * root * math.sqrt(size)).to(q.dtype))
            factors.append((of_columns.mT[..., :rank] * root).to(q.dtype))
        left, right = (torch.cat([x, f.expand(len(x), -1, -1, -1)], -1) for x, f in zip((q, k), factors, strict=True))
        padded = pad(v, (0, left.shape[-1] - size))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(left, right, padded, scale=size**-0.5)
        return out[..., :size].transpose(1, 2)

    return run


PROVIDERS = (
    Provider("ours", GRADIENT, ours, 6.0),
    Provider("ours, gradients of scores stored", GRADIENT, ours, 6.0, stored=True),
    Provider("ours", DENSE, one_layer(True)),
    Provider("eager", GRADIENT, eager, 5.0),
    Provider("SDPA flash", NONE, sdpa(SDPBackend.FLASH_ATTENTION, NONE)),
    Provider("SDPA efficient", GRADIENT, sdpa(SDPBackend.EFFICIENT_ATTENTION, GRADIENT)),
    Provider("SDPA efficient", DENSE, one_layer(False)),
    Provider("cuDNN graph, post_scale_bias", GRADIENT, cudnn_graph, 5.0),
    Provider("TransformerEngine, post_scale_bias", GRADIENT, transformer_engine, 5.0),
    Provider("FlashBias, SVD", DETACHED, flash_bias),
    Provider("Flex, dense bias", GRADIENT, flex("dense"), 6.0, True),
    Provider("Flex, table", GRADIENT, flex("table"), 6.0, True),
    Provider("eager, compiled", GRADIENT, eager_compiled, 6.0, True),
    Provider("SDPA cuDNN", NONE, sdpa(SDPBackend.CUDNN_ATTENTION, NONE)),
    Provider("SDPA cuDNN", DETACHED, sdpa(SDPBackend.CUDNN_ATTENTION, DETACHED)),
    Provider("SDPA math", GRADIENT, sdpa(SDPBackend.MATH, GRADIENT)),
)
BRIEF = tuple(p for p in PROVIDERS if p.name in ("ours", "SDPA flash", "SDPA efficient", "Flex, dense bias"))
EVOFORMER = Provider("DS4Sci_EvoformerAttention", GRADIENT, evoformer, 8.0)  # minutes where it is not yet compiled
