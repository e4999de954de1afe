"""The second design of the backward: the key-value kernel stores the gradients of the scores, and what is left is a sum
and a product. Five products where `fused` needs seven, one exponential where it needs two; more memory.

Its kernels run before (`row_sums`) and after (`queries`) `fused.backward_keys_values`. Shape letters as there.
"""

import triton
import triton.language as tl

from beitforge.kernels.attention.fused import _dot, _load_rows, _store_rows


@triton.jit
def row_sums(out, dout, delta, rows, S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
             COUNT: tl.constexpr):  # fmt: skip
    """The row sums of out · dout, delta [B, A, S]; one program COUNT of the `rows` = B · S · A rows."""
    row, column = tl.cast(tl.program_id(0), tl.int64) * COUNT + tl.arange(0, COUNT), tl.arange(0, KP)
    inside = (row < rows)[:, None] & (column < K)[None, :]
    place = row[:, None] * K + column[None, :]
    o, do = tl.load(out + place, mask=inside, other=0.0), tl.load(dout + place, mask=inside, other=0.0)
    position, head = row // A, row % A
    line = (position // S * A + head) * S + position % S
    tl.store(delta + line, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=row < rows)


@triton.jit
def queries(stored, qkv, dqkv, partial, images, chunk, scale,
            S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SUM: tl.constexpr, UP: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """The gradient of the queries; one program a block of queries of one head of `chunk` images.

    stored: gradients of the scores, [B, A, HEIGHT, WIDTH] with keys on the rows. With SUM, they are summed over the
    images of the chunk in registers, to partial [chunks, A, HEIGHT, WIDTH] where both are below S. One loop over the
    blocks of keys of all images: what the next image needs is fetched while this one's is used.
    """
    BLOCKS: tl.constexpr = (S + BN - 1) // BN
    STRIDE: tl.constexpr = 3 * A * K
    head, turn = tl.program_id(1), tl.program_id(2)
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    first = turn * chunk
    dq = tl.zeros((BM, KP), tl.float32)
    sums = ()
    if SUM:
        for _ in tl.static_range(BLOCKS):
            sums = sums + (tl.zeros((BN, BM), tl.float32),)
    for number in tl.range(0, tl.minimum(chunk, images - first) * BLOCKS, num_stages=STAGES):
        image, i = tl.cast(first + number // BLOCKS, tl.int64), number % BLOCKS
        rows = i * BN + tl.arange(0, BN)
        k = _load_rows(qkv + image * (S * STRIDE) + (A + head) * K, i * BN, BN, STRIDE, S, K, KP, S % BN != 0)
        place = ((image * A + head) * HEIGHT + rows)[:, None] * WIDTH + at[None, :]
        ds = tl.load(stored + place, mask=(rows < S)[:, None] & (at < WIDTH)[None, :], other=0.0, cache_modifier=".cg")
        dq = _dot(tl.trans(ds), k, dq, UP)
        if SUM:
            added = ()
            for j in tl.static_range(BLOCKS):
                one = sums[j]
                if i == j:
                    one = one + ds.to(tl.float32)
                added = added + (one,)
            sums = added
        if i == BLOCKS - 1:
            there = dqkv + image * (S * STRIDE) + head * K
            _store_rows(there, tl.program_id(0) * BM, dq * scale, BM, STRIDE, S, K, KP)
            dq = tl.zeros((BM, KP), tl.float32)
    if SUM:
        for j in tl.static_range(BLOCKS):
            rows = j * BN + tl.arange(0, BN)
            place = (tl.cast(turn * A + head, tl.int64) * HEIGHT + rows)[:, None] * WIDTH + at[None, :]
            tl.store(partial + place, sums[j], mask=(rows < S)[:, None] & (at < S)[None, :])
