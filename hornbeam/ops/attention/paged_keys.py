"""The inner loop of attention in Triton: queries over keys of one row, after FlashAttention-2 (Dao, 2023).

Which queries, which keys and where the result goes is the callers' business.
"""

import triton
import triton.language as tl

from hornbeam.ops.attention.contract import AttentionShape
from hornbeam.ops.launch import shared_memory

BLOCK_KEYS = 64
_RESERVED_BYTES = 1024  # of each program's shared memory, by the system
# For kernels. Functions that they share have their own: were it theirs, too, Triton's name of a kernel on disk would
# depend on which kernel was compiled first in the process.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def num_stages(shape: AttentionShape) -> int:
    """Of the pipeline: two for each block under way, of its pages and of its keys and values, and one.

    Two blocks are under way where a multiprocessor has room for two programs with one more block of keys, of values and
    of queries, which are as large as keys.
    """
    if shape.dtype.itemsize > 2:
        return 1
    needed = 7 * BLOCK_KEYS * shape.head_dim * shape.dtype.itemsize + _RESERVED_BYTES
    return 5 if 2 * needed <= shared_memory(shape.device) else 3


@triton.jit
def to_base_2(scores, scale, SOFT_CAP: tl.constexpr):
    """Dot products of queries and keys as scores whose exponentials are powers of two. SOFT_CAP: 0 for none."""
    log2_e: tl.constexpr = 1.4426950408889634
    if SOFT_CAP != 0.0:  # tanh(x) = 2 sigmoid(2 x) - 1
        return (2 * tl.sigmoid(scores * (2 * scale / SOFT_CAP)) - 1) * (SOFT_CAP * log2_e)
    return scores * (scale * log2_e)


@triton.jit
def _rows(
    table, block, stop, PAGE_SIZE: tl.constexpr, ROW: tl.constexpr, MASKED: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """[BLOCK_KEYS] int64: where the rows of the keys from `block` on begin in the cache; a row has ROW numbers.

    Few pages are loaded one by one: one number for all threads costs less than different ones, and so do their places.
    """
    offsets = tl.arange(0, BLOCK_KEYS)
    keys = block + offsets
    PIECE: tl.constexpr = min(PAGE_SIZE, BLOCK_KEYS)
    MOST_PAGES: tl.constexpr = 8  # to be loaded one by one
    if PAGE_SIZE % PIECE + BLOCK_KEYS % PIECE > 0 or BLOCK_KEYS // PIECE > MOST_PAGES:
        pages = tl.load(table + keys // PAGE_SIZE, mask=keys < stop, other=0).to(tl.int64)
        return (pages * PAGE_SIZE + keys % PAGE_SIZE) * ROW
    rows = tl.zeros([BLOCK_KEYS], tl.int64)
    for index in tl.static_range(BLOCK_KEYS // PIECE):
        key = block + index * PIECE
        page = tl.load(table + key // PAGE_SIZE, mask=key < stop if MASKED else None)
        first = page.to(tl.int64) * (PAGE_SIZE * ROW)
        if PAGE_SIZE > PIECE:
            first += key % PAGE_SIZE * ROW
        rows = tl.where(offsets // PIECE == index, first, rows)
    return rows + offsets % PIECE * ROW


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
    """Queries [N, HEAD_DIM] over the keys from `start`, where a page or a block begins, to `stop` of a row with that
    page table: the weighted means of values, and log-sum-exps to base 2; of a query that sees no key zeros, and -inf.

    maximum, total: [N], of the scores so far, to base 2: their maximum, and the sum of exponentials relative to it.
    CAUSAL: a query at one of `positions` [N] sees no keys behind it, nor those before its WINDOW (0: none); else all
    see all.
    """
    log2_e: tl.constexpr = 1.4426950408889634
    dims = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, BLOCK_KEYS)
    k_head, v_head = k_ptr + kv_head * HEAD_DIM, v_ptr + kv_head * HEAD_DIM
    accumulator = tl.zeros([q.shape[0], HEAD_DIM], tl.float32)
    most = tl.minimum(stop, tl.min(positions) + 1) if CAUSAL else stop
    whole = start + tl.maximum(most - start, 0) // BLOCK_KEYS * BLOCK_KEYS  # up to there all queries see all keys
    for MASKED in tl.static_range(1 if WINDOW else 0, 2):
        begin, end = start if WINDOW or not MASKED else whole, stop if MASKED else whole
        for block in tl.range(begin, end, BLOCK_KEYS, num_stages=1 if MASKED and not WINDOW else None):
            keys = block + offsets
            inside = keys < stop
            rows = _rows(table, block, stop, PAGE_SIZE, NUM_KV_HEADS * HEAD_DIM, MASKED, BLOCK_KEYS)
            if MASKED:
                k = tl.load(k_head + rows[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
                v = tl.load(v_head + rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
            else:
                k = tl.load(k_head + rows[None, :] + dims[:, None])
                v = tl.load(v_head + rows[:, None] + dims[None, :])
            scores = tl.dot(q, k, input_precision="ieee")
            factor = scale * log2_e
            if SOFT_CAP != 0.0:
                scores = to_base_2(scores, scale, SOFT_CAP)
                factor = 1.0
            if MASKED:
                seen = inside[None, :]
                if CAUSAL:
                    seen &= keys[None, :] <= positions[:, None]
                    if WINDOW:
                        seen &= keys[None, :] > positions[:, None] - WINDOW
                scores = tl.where(seen, scores, -float("inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1) * factor)
            reference = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores * factor - reference[:, None])
            decay = tl.exp2(maximum - reference)
            accumulator = accumulator * decay[:, None]
            accumulator += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * decay + tl.sum(weights, 1)
            maximum = higher
    divisor = tl.where(total == 0, 1.0, total)
    return accumulator / divisor[:, None], maximum + tl.log2(divisor)
