"""Triton kernels: attention over packed qkv with an additive bias, and all of its gradients, without atomics.

Shape letters as everywhere: B images · S positions · A heads · K head size; KP: K padded to a power of two. Keys go by
in `FULL` blocks of `BN` and a last one of `BR` (0: none), queries in blocks of `BM`; in the key-value kernel the two
change places. No mask is computed for a full block.

The bias is the accumulator's start: tiles hold bias / scale, -inf at keys beyond S, in the order in which the matrix
unit wants an accumulator (`tiles.fragment_order`), so that a tile is one contiguous read and costs no add, no mask and
no change of layout. Another compiler's accumulator order would cost speed, not correctness.

`UP` casts operands to float32 before each product: for Triton's interpreter, which multiplies bf16 wrongly.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, accumulator, UP: tl.constexpr):
    if UP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _load_tile(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [ROWS, COLUMNS] stored in fragment order, as float32."""
    x = tl.load(pointer + tl.arange(0, ROWS * COLUMNS))
    x = tl.reshape(x, (COLUMNS // 16, ROWS // 16, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 5, 2, 0, 4, 3, 6))
    return tl.reshape(x, (ROWS, COLUMNS)).to(tl.float32)


@triton.jit
def _store_tile(pointer, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of _load_tile."""
    x = tl.reshape(tile, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2))
    x = tl.permute(x, (3, 0, 2, 5, 4, 1, 6))
    tl.store(pointer + tl.arange(0, ROWS * COLUMNS), tl.reshape(x, (ROWS * COLUMNS,)))


@triton.jit
def _load_rows(
    base,
    first,
    COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows first … first + COUNT of one head, [COUNT, KP]; beyond S (only if MASKED) and beyond K they are zero.

    Read past the first-level cache: a program uses them once.
    """
    rows, columns = first + tl.arange(0, COUNT), tl.arange(0, KP)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if MASKED and K < KP:
        inside = (rows < S)[:, None] & (columns < K)[None, :]
        return tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
    elif MASKED:
        return tl.load(pointers, mask=(rows < S)[:, None], other=0.0, cache_modifier=".cg")
    elif K < KP:
        return tl.load(pointers, mask=(columns < K)[None, :], other=0.0, cache_modifier=".cg")
    else:
        return tl.load(pointers, cache_modifier=".cg")


@triton.jit
def _store_rows(
    base,
    first,
    x,
    COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    rows, columns = first + tl.arange(0, COUNT), tl.arange(0, KP)
    inside = (rows < S)[:, None] & (columns < K)[None, :]
    tl.store(base + rows[:, None] * STRIDE + columns[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    q,
    k,
    tile,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    UP: tl.constexpr,
):
    """q · kᵀ + bias / scale, float32 [ROWS, COLUMNS]; -inf at keys beyond S."""
    if BIAS:
        return _dot(q, tl.trans(k), _load_tile(tile, ROWS, COLUMNS), UP)
    else:
        scores = _dot(q, tl.trans(k), tl.zeros((ROWS, COLUMNS), tl.float32), UP)
        if MASKED:
            scores = tl.where((first + tl.arange(0, COLUMNS) < S)[None, :], scores, float("-inf"))
        return scores


@triton.jit
def _online(q, k, v, tile, first, largest, total, out, to_log2, BM: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
            MASKED: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """One block of keys of a softmax taken as they go by: the largest score, the sum and the output so far."""
    scores = _scores(q, k, tile, first, BM, BN, S, MASKED, BIAS, UP)
    now = tl.maximum(tl.maximum(largest, tl.max(scores, 1) * to_log2), -1e30)  # finite where a whole block is -inf
    weights = tl.exp2(scores * to_log2 - now[:, None])
    shrink = tl.exp2(largest - now)
    total = total * shrink + tl.sum(weights, 1)
    out = _dot(weights.to(v.dtype), v, out * shrink[:, None], UP)
    return now, total, out


@triton.jit
def forward(qkv, tiles, out, lse, images, tiles_of_head, to_log2,
            S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BR: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program a block of queries of one head of one image. lse: log2 of the sum of exponentials, for the gradients.

    Programs that follow each other share keys and values, then the head and with it the bias.
    """
    FULL: tl.constexpr = S // BN
    BLOCKS: tl.constexpr = (S + BM - 1) // BM
    STRIDE: tl.constexpr = 3 * A * K
    block, pair = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, image = pair // images, tl.cast(pair % images, tl.int64)
    base = qkv + image * (S * STRIDE) + head * K
    keys, values = base + A * K, base + 2 * A * K
    q = _load_rows(base, block * BM, BM, STRIDE, S, K, KP, S % BM != 0)
    tile = tiles + head * tiles_of_head + block * (BM * (FULL * BN + BR))
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, KP), tl.float32)
    for i in tl.range(0, FULL, num_stages=STAGES):
        k = _load_rows(keys, i * BN, BN, STRIDE, S, K, KP, False)
        v = _load_rows(values, i * BN, BN, STRIDE, S, K, KP, False)
        largest, total, o = _online(
            q, k, v, tile + i * (BM * BN), i * BN, largest, total, o, to_log2, BM, BN, S, False, BIAS, UP
        )
    if BR > 0:
        k = _load_rows(keys, FULL * BN, BR, STRIDE, S, K, KP, True)
        v = _load_rows(values, FULL * BN, BR, STRIDE, S, K, KP, True)
        largest, total, o = _online(
            q, k, v, tile + FULL * (BM * BN), FULL * BN, largest, total, o, to_log2, BM, BR, S, True, BIAS, UP
        )
    _store_rows(out + image * (S * A * K) + head * K, block * BM, o / total[:, None], BM, A * K, S, K, KP)
    rows = block * BM + tl.arange(0, BM)
    tl.store(lse + (image * A + head) * S + rows, largest + tl.log2(total), mask=rows < S)


@triton.jit
def _score_gradient(q, dout, k, v, tile, first, lse, delta, to_log2, BM: tl.constexpr, BN: tl.constexpr,
                    S: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """The gradient of the scores, float32 [BM, BN]: it is the bias's."""
    weights = tl.exp2(_scores(q, k, tile, first, BM, BN, S, MASKED, BIAS, UP) * to_log2 - lse[:, None])
    return weights * (_dot(dout, tl.trans(v), tl.zeros((BM, BN), tl.float32), UP) - delta[:, None])


@triton.jit
def backward_queries(qkv, out, dout, dqkv, tiles, lse, delta, partial, images, chunk, tiles_of_head, tiles_of_image,
                     to_log2, scale,
                     S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr, UP: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """The gradient of the queries; one program a block of queries of one head of `chunk` images.

    Also delta, the row sums of out · dout, which the key-value kernel reads. With SUM, the gradient of the bias: its
    tiles are summed over the images of the chunk in registers and written once, to partial [chunks, A, tiles].
    tiles_of_image is 0, told at run time: else the compiler holds the bias in registers over all images, and spills.
    """
    FULL: tl.constexpr = S // BN
    BLOCKS: tl.constexpr = (S + BM - 1) // BM
    STRIDE: tl.constexpr = 3 * A * K
    PADDED: tl.constexpr = FULL * BN + BR
    MASKED: tl.constexpr = S % BM != 0
    block, head, turn = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block * BM + tl.arange(0, BM)
    sums = ()
    if SUM:
        for _ in tl.static_range(FULL):
            sums = sums + (tl.zeros((BM, BN), tl.float32),)
        if BR > 0:
            rest = tl.zeros((BM, BR), tl.float32)
    for number in tl.range(turn * chunk, tl.minimum(turn * chunk + chunk, images), num_stages=1):
        image = tl.cast(number, tl.int64)
        base = qkv + image * (S * STRIDE) + head * K
        keys, values = base + A * K, base + 2 * A * K
        beside = image * (S * A * K) + head * K
        q = _load_rows(base, block * BM, BM, STRIDE, S, K, KP, MASKED)
        do = _load_rows(dout + beside, block * BM, BM, A * K, S, K, KP, MASKED)
        o = _load_rows(out + beside, block * BM, BM, A * K, S, K, KP, MASKED)
        d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        line = (image * A + head) * S + rows
        tl.store(delta + line, d, mask=rows < S)
        row_lse = tl.load(lse + line, mask=rows < S, other=float("inf"))
        tile = tiles + head * tiles_of_head + block * (BM * PADDED) + number * tiles_of_image
        dq = tl.zeros((BM, KP), tl.float32)
        for i in tl.range(0, FULL, num_stages=STAGES):
            k = _load_rows(keys, i * BN, BN, STRIDE, S, K, KP, False)
            v = _load_rows(values, i * BN, BN, STRIDE, S, K, KP, False)
            ds = _score_gradient(
                q, do, k, v, tile + i * (BM * BN), i * BN, row_lse, d, to_log2, BM, BN, S, False, BIAS, UP
            )
            dq = _dot(ds.to(k.dtype), k, dq, UP)
            if SUM:
                added = ()
                for j in tl.static_range(FULL):
                    one = sums[j]
                    if i == j:
                        one = one + ds
                    added = added + (one,)
                sums = added
        if BR > 0:
            k = _load_rows(keys, FULL * BN, BR, STRIDE, S, K, KP, True)
            v = _load_rows(values, FULL * BN, BR, STRIDE, S, K, KP, True)
            ds = _score_gradient(
                q, do, k, v, tile + FULL * (BM * BN), FULL * BN, row_lse, d, to_log2, BM, BR, S, True, BIAS, UP
            )
            dq = _dot(ds.to(k.dtype), k, dq, UP)
            if SUM:
                rest += ds
        _store_rows(dqkv + image * (S * STRIDE) + head * K, block * BM, dq * scale, BM, STRIDE, S, K, KP)
    if SUM:
        place = partial + tl.cast((turn * A + head) * BLOCKS + block, tl.int64) * (BM * PADDED)
        for j in tl.static_range(FULL):
            _store_tile(place + j * (BM * BN), sums[j], BM, BN)
        if BR > 0:
            _store_tile(place + FULL * (BM * BN), rest, BM, BR)


@triton.jit
def _key_value_step(k, v, q, do, tile, line, delta, kept, first, dk, dv, to_log2, BM: tl.constexpr, BN: tl.constexpr,
                    S: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
                    STORE: tl.constexpr, UP: tl.constexpr):  # fmt: skip
    """A block of queries for a block of keys: scores with keys on the rows, [BM, BN]."""
    at = first + tl.arange(0, BN)
    if MASKED:
        row_lse = tl.load(line + at, mask=at < S, other=float("inf"))  # no weight for queries beyond S
        d = tl.load(delta + at, mask=at < S, other=0.0)
    else:
        row_lse, d = tl.load(line + at), tl.load(delta + at)
    if BIAS:
        scores = _dot(k, tl.trans(q), _load_tile(tile, BM, BN), UP)
    else:
        scores = _dot(k, tl.trans(q), tl.zeros((BM, BN), tl.float32), UP)
    weights = tl.exp2(scores * to_log2 - row_lse[None, :])
    dv = _dot(weights.to(q.dtype), do, dv, UP)
    ds = (weights * (_dot(v, tl.trans(do), tl.zeros((BM, BN), tl.float32), UP) - d[None, :])).to(q.dtype)
    if STORE:
        tl.store(kept + tl.arange(0, BM)[:, None] * PADDED + at[None, :], ds)
    return _dot(ds, q, dk, UP), dv


@triton.jit
def backward_keys_values(qkv, dout, dqkv, tiles, lse, delta, stored, images, tiles_of_head, to_log2, scale,
                         S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
                         BN: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr, UP: tl.constexpr,
                         STAGES: tl.constexpr):  # fmt: skip
    """The gradients of keys and values; one program a block of keys of one head of an image. tiles: keys on rows.

    With STORE, the gradients of the scores too, for kernels.attention.stored: [B, A, keys, queries] in qkv's type, both
    padded to whole blocks, where they hold anything.
    """
    FULL: tl.constexpr = S // BN
    BLOCKS: tl.constexpr = (S + BM - 1) // BM
    STRIDE: tl.constexpr = 3 * A * K
    PADDED: tl.constexpr = FULL * BN + BR
    block, pair = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    head, image = pair // images, tl.cast(pair % images, tl.int64)
    kept = stored + ((image * A + head) * BLOCKS + block) * (BM * PADDED)
    base = qkv + image * (S * STRIDE) + head * K
    douts = dout + image * (S * A * K) + head * K
    line, row_sums = lse + (image * A + head) * S, delta + (image * A + head) * S
    k = _load_rows(base + A * K, block * BM, BM, STRIDE, S, K, KP, S % BM != 0)
    v = _load_rows(base + 2 * A * K, block * BM, BM, STRIDE, S, K, KP, S % BM != 0)
    tile = tiles + head * tiles_of_head + block * (BM * PADDED)
    dk, dv = tl.zeros((BM, KP), tl.float32), tl.zeros((BM, KP), tl.float32)
    for i in tl.range(0, FULL, num_stages=STAGES):
        q = _load_rows(base, i * BN, BN, STRIDE, S, K, KP, False)
        do = _load_rows(douts, i * BN, BN, A * K, S, K, KP, False)
        dk, dv = _key_value_step(
            k, v, q, do, tile + i * (BM * BN), line, row_sums, kept, i * BN, dk, dv, to_log2,
            BM, BN, S, PADDED, False, BIAS, STORE, UP,
        )  # fmt: skip
    if BR > 0:
        q = _load_rows(base, FULL * BN, BR, STRIDE, S, K, KP, True)
        do = _load_rows(douts, FULL * BN, BR, A * K, S, K, KP, True)
        dk, dv = _key_value_step(
            k, v, q, do, tile + FULL * (BM * BN), line, row_sums, kept, FULL * BN, dk, dv, to_log2,
            BM, BR, S, PADDED, True, BIAS, STORE, UP,
        )  # fmt: skip
    there = dqkv + image * (S * STRIDE) + head * K
    _store_rows(there + A * K, block * BM, dk * scale, BM, STRIDE, S, K, KP)
    _store_rows(there + 2 * A * K, block * BM, dv, BM, STRIDE, S, K, KP)


@triton.jit
def backward_bias(qkv, dout, tiles, lse, delta, partial, images, chunk, tiles_of_head, to_log2,
                  S: tl.constexpr, A: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BR: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, UP: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """The gradient of the bias alone, for rows too long to hold in registers: one program a tile of `WIDTH` keys, from
    block FIRST on, of one head of `chunk` images. partial as in backward_queries, which has written delta."""
    BLOCKS: tl.constexpr = (S + BM - 1) // BM
    STRIDE: tl.constexpr = 3 * A * K
    PADDED: tl.constexpr = (S // BN) * BN + BR
    block, column = tl.program_id(0) % BLOCKS, FIRST + tl.program_id(0) // BLOCKS
    head, turn = tl.program_id(1), tl.program_id(2)
    rows = block * BM + tl.arange(0, BM)
    place = block * (BM * PADDED) + column * (BM * BN)
    total = tl.zeros((BM, WIDTH), tl.float32)
    for number in tl.range(turn * chunk, tl.minimum(turn * chunk + chunk, images), num_stages=STAGES):
        image = tl.cast(number, tl.int64)
        base = qkv + image * (S * STRIDE) + head * K
        q = _load_rows(base, block * BM, BM, STRIDE, S, K, KP, S % BM != 0)
        do = _load_rows(dout + image * (S * A * K) + head * K, block * BM, BM, A * K, S, K, KP, S % BM != 0)
        k = _load_rows(base + A * K, column * BN, WIDTH, STRIDE, S, K, KP, FIRST == S // BN)  # the last, padded block
        v = _load_rows(base + 2 * A * K, column * BN, WIDTH, STRIDE, S, K, KP, FIRST == S // BN)
        line = (image * A + head) * S + rows
        row_lse = tl.load(lse + line, mask=rows < S, other=float("inf"))
        d = tl.load(delta + line, mask=rows < S, other=0.0)
        tile = tiles + head * tiles_of_head + place
        total += _score_gradient(q, do, k, v, tile, column * BN, row_lse, d, to_log2, BM, WIDTH, S, True, True, UP)
    at = tl.cast(turn * A + head, tl.int64) * (BLOCKS * BM * PADDED) + place
    _store_tile(partial + at, total, BM, WIDTH)
