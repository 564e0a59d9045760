"""The inner loop of attention in Triton: queries over keys of one row, after FlashAttention-2 (Dao, 2023).

Which queries, which keys and where the result goes is the callers' business.
"""

import triton
import triton.language as tl

BLOCK_KEYS = 64
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def to_base_2(scores, scale, SOFT_CAP: tl.constexpr):
    """Dot products of queries and keys as scores whose exponentials are powers of two. SOFT_CAP: 0 for none."""
    if SOFT_CAP != 0.0:  # tanh(x) = 2 sigmoid(2 x) - 1
        return (2 * tl.sigmoid(scores * (2 * scale / SOFT_CAP)) - 1) * (SOFT_CAP * LOG2_E)
    return scores * (scale * LOG2_E)


@triton.jit
def add_block(scores, seen, v, accumulator, maximum, total, scale, SOFT_CAP: tl.constexpr):
    """Add the values [K, D] of a block of keys, whose products with N queries are `scores` [N, K], where `seen`.

    maximum, total: [N], of the scores so far, to base 2: their maximum, and the sum of exponentials relative to it.
    Returns accumulator [N, D], maximum and total anew.
    """
    scores = tl.where(seen, to_base_2(scores, scale, SOFT_CAP), -float("inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(maximum - reference)
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return accumulator, higher, total * decay + tl.sum(weights, 1)


@triton.jit
def finish(accumulator, maximum, total):
    """The weighted means of values, and the log-sum-exps to base 2; of a query that saw no key zeros, and -inf."""
    divisor = tl.where(total == 0, 1.0, total)
    return accumulator / divisor[:, None], maximum + tl.log2(divisor)


@triton.jit
def attend_keys(
    q,
    k_ptr,
    v_ptr,
    table,
    kv_head,
    start,
    stop,
    positions,
    maximum,
    total,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Queries [N, HEAD_DIM] over the keys from `start` to `stop` of a row with that page table, as `finish` tells it.

    maximum, total: see `add_block`. CAUSAL: a query at one of `positions` [N] sees no keys behind it, nor those before
    its WINDOW (0: none); else all see all.
    """
    dims = tl.arange(0, HEAD_DIM)
    accumulator = tl.zeros([q.shape[0], HEAD_DIM], tl.float32)
    for block in range(start, stop, BLOCK_KEYS):
        keys = block + tl.arange(0, BLOCK_KEYS)
        inside = keys < stop
        page = tl.load(table + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        cell = ((page * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        k = tl.load(k_ptr + cell[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        seen = inside[None, :]
        if CAUSAL:
            seen &= keys[None, :] <= positions[:, None]
            if WINDOW:
                seen &= keys[None, :] > positions[:, None] - WINDOW
        v = tl.load(v_ptr + cell[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        accumulator, maximum, total = add_block(scores, seen, v, accumulator, maximum, total, scale, SOFT_CAP)
    return finish(accumulator, maximum, total)
