"""The bias as the fused kernels read it, and back: dense [A, S, S] cut into tiles whose numbers lie in fragment order.

One gather makes all tiles of a step, one gives the gradient its dense form. The maps depend on S and the blocks alone
and are kept per device.
"""

import functools

import torch
from torch import Tensor

from beitforge.kernels.attention.block_sizes import Blocks, Plan


def pack(bias_ASS: Tensor, plan: Plan, scale: float, dtype: torch.dtype) -> Tensor:
    """Tiles [A, T] of bias / scale: of the forward, then the query, then the key-value kernel (`offsets`).

    Kernels with the same blocks share tiles. Keys beyond S get -inf, queries beyond S get 0. A row whose largest bias
    the type cannot hold is lowered by it, which softmax does not see; what then is below the type has no weight.
    """
    heads, positions, _ = bias_ASS.shape
    bias_ASS, limit = bias_ASS.detach().float() / scale, torch.finfo(dtype).max
    largest = bias_ASS.amax(dim=-1, keepdim=True)
    lowered = bias_ASS - torch.where(largest.isfinite() & (largest.abs() > limit), largest, 0.0)
    flat = torch.where(lowered.isinf(), lowered, lowered.clamp(-limit, limit)).reshape(heads, -1)
    ends = [flat.new_full((heads, 1), float("-inf")), flat.new_zeros((heads, 1))]  # made on the device, without a copy
    where = _all_places(positions, plan, bias_ASS.device)
    return torch.cat([flat, *ends], dim=1).to(dtype).index_select(1, where)


def offsets(positions: int, plan: Plan) -> tuple[int, int, int]:
    """Where the tiles of the forward, query and key-value kernels begin within a head's."""
    forward = plan.forward.size(positions)
    queries = 0 if _alike(plan) else forward
    return 0, queries, forward if _alike(plan) else forward + plan.queries.size(positions)


def _alike(plan: Plan) -> bool:
    return (plan.forward.rows, plan.forward.columns) == (plan.queries.rows, plan.queries.columns)


def unpack(partial_CAT: Tensor, positions: int, blocks: Blocks) -> Tensor:
    """The dense gradient [A, S, S] from partial sums [chunks, A, tiles], added in their order."""
    heads = partial_CAT.shape[1]
    where = _gradient_places(positions, blocks, partial_CAT.device)
    return partial_CAT.sum(dim=0).index_select(1, where).view(heads, positions, positions)


@functools.lru_cache(maxsize=32)
def _all_places(positions: int, plan: Plan, device: torch.device) -> Tensor:
    forms = [_places(positions, plan.forward, False)]
    if not _alike(plan):
        forms.append(_places(positions, plan.queries, False))
    forms.append(_places(positions, plan.keys_values, True))
    return torch.cat(forms).to(device)


def _places(positions: int, blocks: Blocks, transposed: bool) -> Tensor:
    """For each number of a head's tiles, its place in the flat [S · S], or S² for -inf, or S² + 1 for 0."""
    full, rest = blocks.split(positions)
    height = -(-positions // blocks.rows) * blocks.rows
    grid = torch.full((height, full * blocks.columns + rest), positions**2 + 1)
    dense = torch.arange(positions**2).view(positions, positions)
    grid[:positions, :positions] = dense.T if transposed else dense
    if not transposed:
        grid[:, positions:] = positions**2
    return torch.cat([_cut(grid, *box) for box in _boxes(positions, blocks)])


def _cut(grid: Tensor, top: int, left: int, rows: int, columns: int) -> Tensor:
    return grid[top : top + rows, left : left + columns].reshape(-1)[fragment_order(rows, columns)]


def _boxes(positions: int, blocks: Blocks) -> list[tuple[int, int, int, int]]:
    """Top, left, rows and columns of every tile, in the order in which they are stored."""
    full, rest = blocks.split(positions)
    widths = [blocks.columns] * full + [rest] * bool(rest)
    lefts = [sum(widths[:i]) for i in range(len(widths))]
    tops = range(0, positions, blocks.rows)
    return [(top, left, blocks.rows, width) for top in tops for left, width in zip(lefts, widths, strict=True)]


@functools.lru_cache(maxsize=32)
def _gradient_places(positions: int, blocks: Blocks, device: torch.device) -> Tensor:
    """For each place of the flat [S · S], that of its number in a head's tiles."""
    places = _places(positions, blocks, False)
    inside = places < positions**2
    where = torch.empty(positions**2, dtype=torch.int64)
    where[places[inside]] = torch.arange(len(places))[inside]
    return where.to(device)


def fragment_order(rows: int, columns: int) -> Tensor:
    """Row-major place of each number of a tile, as stored: 16 × 16 fragments of the matrix unit, column by
    column, within each the eight numbers that a thread holds side by side."""
    places = torch.arange(rows * columns).view(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    return places.permute(3, 0, 2, 5, 4, 1, 6).reshape(-1)
