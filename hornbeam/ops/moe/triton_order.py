"""Tokens in the order of their experts, in blocks that belong to one expert each.

A pair is a token with one of its experts; pair p is slot p % k of token p // k. All shapes follow from the number of
tokens, so that the kernels can run inside a graph: there is room for the worst case.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2

_CHUNK = 2048  # pairs that a program looks at together
_SMALL_CHUNK = 256  # if there are no more
VARIED_PAIRS = (_SMALL_CHUNK, _CHUNK, 2 * _CHUNK)  # about so many pairs each launch other variants of the kernels
_SEGMENTS = 8  # in which more pairs than that are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Pairs in blocks, expert by expert; int32. A block's free places hold the number of all pairs.

    Of the B blocks, so many that there are always enough, the first `num_rows / block_m` are in use.
    """

    pairs: Tensor  # [B * block_m]
    experts: Tensor  # [B], of each block
    num_rows: Tensor  # [1], places in blocks that are in use
    block_m: int
    num_pairs: int
    top_k: int


@triton.jit
def _histogram(ids_ptr, first, end, CHUNK: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """Pairs of each expert among CHUNK."""
    pairs = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pairs, mask=pairs < end, other=-1)
    counts = tl.histogram(tl.where(ids < 0, EXPERTS, ids), BINS)
    return tl.where(tl.arange(0, BINS) < EXPERTS, counts, 0)


@Kernel
@triton.jit(do_not_specialize=["num_pairs", "span"])
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_pairs,
    span,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Counts the pairs of each expert in one segment of `span` pairs: a row of [SEGMENTS, BINS]."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, num_pairs)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(begin, end, CHUNK):
        counts += _histogram(ids_ptr, first, end, CHUNK, EXPERTS, BINS)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@Kernel
@triton.jit(do_not_specialize=["num_pairs", "span"])
def _order_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    span,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One expert's pairs of one segment in ascending order; after the last, num_pairs up to a multiple of BLOCK_M."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert, segment = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    if SEGMENTS == 1:
        counts = _histogram(ids_ptr, 0, num_pairs, CHUNK, EXPERTS, BINS)
        position = 0
    else:
        rows = tl.arange(0, SEGMENTS)
        by_segment = tl.load(counts_ptr + rows[:, None] * BINS + bins[None, :])
        counts = tl.sum(by_segment, 0)
        earlier = (rows < segment)[:, None] & (bins == expert)[None, :]
        position = tl.sum(tl.sum(tl.where(earlier, by_segment, 0), 0), 0)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.sum(tl.where(bins < expert, padded, 0), 0)
    end = tl.sum(tl.where(bins <= expert, padded, 0), 0)
    last = start + tl.sum(tl.where(bins == expert, counts, 0), 0)
    position += start
    for first in range(segment * span, tl.minimum(segment * span + span, num_pairs), CHUNK):
        pairs = first + tl.arange(0, CHUNK)
        own = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
        rank = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order_ptr + position + rank - 1, pairs, mask=own)
        position += tl.sum(own.to(tl.int32), 0)
    if segment == 0:
        fill = last + tl.arange(0, BLOCK_M)
        tl.store(order_ptr + fill, tl.zeros((BLOCK_M,), tl.int32) + num_pairs, mask=fill < end)
        for block in range(start // BLOCK_M, end // BLOCK_M):
            tl.store(block_experts_ptr + block, expert)
        if expert == EXPERTS - 1:
            tl.store(num_rows_ptr, end)


def order_by_expert(ids: Tensor, num_experts: int, block_m: int) -> Order:
    """Order the pairs of ids [T, k], those of -1 left out."""
    num_pairs = ids.numel()
    num_blocks = min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))
    order = Order(
        pairs=ids.new_empty(num_blocks * block_m),
        experts=ids.new_empty(num_blocks),
        num_rows=ids.new_empty(1),
        block_m=block_m,
        num_pairs=num_pairs,
        top_k=ids.shape[1],
    )
    bins = next_power_of_2(num_experts + 1)
    counts, segments, chunk = ids, 1, _SMALL_CHUNK if num_pairs <= _SMALL_CHUNK else _CHUNK
    if num_pairs > _CHUNK:
        counts, segments = ids.new_empty(_SEGMENTS, bins), _SEGMENTS
    span = cdiv(num_pairs, segments * chunk) * chunk
    early = early_launch(ids.device)
    if segments > 1:
        _count_kernel[(segments,)](ids, counts, num_pairs, span, EXPERTS=num_experts, BINS=bins, CHUNK=chunk, **early)
    _order_kernel[(num_experts, segments)](
        ids,
        counts,
        order.pairs,
        order.experts,
        order.num_rows,
        num_pairs,
        span,
        EXPERTS=num_experts,
        BINS=bins,
        CHUNK=chunk,
        SEGMENTS=segments,
        BLOCK_M=block_m,
        **early,
    )
    return order
