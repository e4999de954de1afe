"""Triton kernel: one pass over a row of logits for its cross entropy, one that turns the row into its gradient."""

import triton
import triton.language as tl

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_entropy_rows(logits, tokens, counts, losses, right,
                       V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):  # fmt: skip
    """One program a row of logits [T, V]. Writes count · loss and count · (largest is the token's) in float32; with
    GRADIENT the row becomes count · (softmax − 1 at the token). The second reading comes out of the cache."""
    row = tl.cast(tl.program_id(0), tl.int64)
    base = logits + row * V
    token, count = tl.load(tokens + row), tl.load(counts + row)
    largest, total, of_token = float("-inf"), 0.0, 0.0
    best = tl.cast(0, tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(base + at, mask=at < V, other=float("-inf")).to(tl.float32)
        here = tl.max(x, 0)
        best = tl.where(here > largest, start + tl.argmax(x, 0), best)
        now = tl.maximum(largest, here)
        total = total * tl.exp2((largest - now) * _LOG2E) + tl.sum(tl.exp2((x - now) * _LOG2E), 0)
        of_token += tl.sum(tl.where(at == token, x, 0.0), 0)
        largest = now
    tl.store(losses + row, count * (largest + tl.log2(total) / _LOG2E - of_token))
    tl.store(right + row, tl.where(best == token, count, 0.0))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(base + at, mask=at < V, other=float("-inf")).to(tl.float32)
            share = tl.exp2((x - largest) * _LOG2E) / total
            gradient = count * tl.where(at == token, share - 1.0, share)
            tl.store(base + at, gradient.to(logits.dtype.element_ty), mask=at < V)
