"""Decode attention of one row in Triton, from projected heads to the merged result, in two kernels.

A step of one row waits for kernels rather than for memory. So the first one does all that would stand ahead of it, too:
each program normalises and rotates its own queries and the newest key, the first of each head writes the cache, and
the cached keys and values that a program begins with are under way before the projection is done.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.contract import AttentionShape, Rows
from hornbeam.ops.attention.paged_keys import LOG2_E, to_base_2
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.qkv.triton import normalised

_MAX_BLOCK_KEYS = 64
_BLOCK_BYTES = 16384  # of keys, and of values, which wait in registers
_LEAST_BLOCK = 16  # packed queries, the least that the matrix units take
_MAX_SPLITS = 32
_PROGRAMS = 256  # about two per multiprocessor
_WARPS = 8

MergeParts = Callable[[Tensor, Tensor, Tensor], Tensor]


@triton.jit
def _prepared(
    x_ptr, weight_ptr, half, inside, cos, sin, eps, HALF: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr
):
    """Both halves of heads at `x_ptr` [N, 1], normalised and rotated; rounds where the reference does."""
    first = tl.load(x_ptr + half, mask=inside, other=0.0)
    second = tl.load(x_ptr + HALF + half, mask=inside, other=0.0)
    if NORM:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first + wide_second * wide_second, 1)
        factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = normalised(first, weight_ptr + half, half < HALF, factor)
        second = normalised(second, weight_ptr + HALF + half, half < HALF, factor)
    if ROTATED:
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
    return first, second


@triton.jit
def _load_block(
    k_ptr,
    v_ptr,
    table,
    kv_head,
    begin,
    end,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Both halves of keys [HEAD_DIM / 2, BLOCK_KEYS], and values [BLOCK_KEYS, HEAD_DIM]."""
    keys = begin + tl.arange(0, BLOCK_KEYS)
    inside = keys < end
    page = tl.load(table + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    cell = ((page * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    half = k_ptr + cell[None, :] + tl.arange(0, HEAD_DIM // 2)[:, None]
    first = tl.load(half, mask=inside[None, :], other=0.0)
    second = tl.load(half + HEAD_DIM // 2, mask=inside[None, :], other=0.0)
    values = tl.load(v_ptr + cell[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=inside[:, None], other=0.0)
    return first, second, values


@triton.jit
def _attend_block(
    q_first, q_second, k_first, k_second, v, keys, end, maximum, total, accumulator, scale, SOFT_CAP: tl.constexpr
):
    """Add a block of keys to what the queries have seen before."""
    scores = tl.dot(q_first, k_first, input_precision="ieee")
    scores = tl.dot(q_second, k_second, scores, input_precision="ieee")
    scores = tl.where((keys < end)[None, :], to_base_2(scores, scale, SOFT_CAP), -float("inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(maximum - reference)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")
    return higher, total * decay + tl.sum(weights, 1), accumulator


# Slots come out of an upload at any offset: specialised on alignment, the kernel would be compiled twice.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _row_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    positions_ptr,
    cells_ptr,
    k_pages_ptr,
    v_pages_ptr,
    page_tables_ptr,
    slots_ptr,
    lens_ptr,
    sinks_ptr,
    parts_ptr,
    lse_ptr,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    page_table_stride,
    eps,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    NORM: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One key-value head, one stretch of keys; the first stretch has the newest key as well.

    parts: [NUM_HEADS, NUM_SPLITS, HEAD_DIM] float32; lse: [NUM_HEADS, NUM_SPLITS] float32, base 2.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    kv_head, split = tl.program_id(0), tl.program_id(1)
    newest = tl.load(lens_ptr) - 1
    oldest = tl.maximum(newest - WINDOW + 1, 0) if WINDOW else 0
    stretch = tl.cdiv(tl.cdiv(newest - oldest, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    begin = oldest + split * stretch
    end = tl.minimum(begin + stretch, newest)
    table = page_tables_ptr + tl.load(slots_ptr) * page_table_stride
    k_first, k_second, v = _load_block(
        k_pages_ptr, v_pages_ptr, table, kv_head, begin, end, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_KEYS
    )
    half = tl.arange(0, HALF)[None, :]
    cos, sin = 1.0, 0.0
    if ROTATED:
        angles = table_ptr + tl.load(positions_ptr) * HEAD_DIM
        cos, sin = tl.load(angles + half), tl.load(angles + HALF + half)
    cell = (tl.load(cells_ptr) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    if EARLY:
        tl.extra.cuda.gdc_wait()

    packed = tl.arange(0, BLOCK)
    head, valid = kv_head * GROUP + packed, packed < GROUP
    q_first, q_second = _prepared(
        q_ptr + head[:, None] * q_head_stride, q_weight_ptr, half, valid[:, None], cos, sin, eps, HALF, NORM, ROTATED
    )
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    if split == 0:
        new_first, new_second = _prepared(
            k_ptr + kv_head * k_head_stride, k_weight_ptr, half, half < HALF, cos, sin, eps, HALF, NORM, ROTATED
        )
        dims = tl.arange(0, HEAD_DIM)
        value = tl.load(v_ptr + kv_head * v_head_stride + dims)
        tl.store(k_pages_ptr + cell + half, new_first)
        tl.store(k_pages_ptr + cell + HALF + half, new_second)
        tl.store(v_pages_ptr + cell + dims, value)
        scores = q_first.to(tl.float32) * new_first.to(tl.float32) + q_second.to(tl.float32) * new_second.to(tl.float32)
        maximum = to_base_2(tl.sum(scores, 1), scale, SOFT_CAP)
        total += 1.0
        accumulator += value.to(tl.float32)[None, :]
        if HAS_SINKS:  # as if it had seen a key with that score and a value of zeros
            sinks = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
            total += tl.exp2(sinks - maximum)
    for block in range(begin, end, BLOCK_KEYS):
        next_first, next_second, next_v = _load_block(
            k_pages_ptr, v_pages_ptr, table, kv_head, block + BLOCK_KEYS, end, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE,
            BLOCK_KEYS,
        )  # fmt: skip
        keys = block + tl.arange(0, BLOCK_KEYS)
        maximum, total, accumulator = _attend_block(
            q_first, q_second, k_first, k_second, v, keys, end, maximum, total, accumulator, scale, SOFT_CAP
        )
        k_first, k_second, v = next_first, next_second, next_v
    part = head * NUM_SPLITS + split
    divisor = tl.where(total == 0, 1.0, total)  # a part that saw no key counts nothing: its lse is -inf
    dims = tl.arange(0, HEAD_DIM)
    tl.store(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], accumulator / divisor[:, None], mask=valid[:, None])
    tl.store(lse_ptr + part, maximum + tl.log2(divisor), mask=valid)


def plan_row(shape: AttentionShape, rows: Rows, merge_parts: MergeParts) -> Callable[..., Tensor]:
    """See `StoringAttend.run`, for one row with one query. merge_parts: those of `_row_attend_kernel` -> [1, Hq, D]."""
    block_keys = min(_MAX_BLOCK_KEYS, _BLOCK_BYTES // (shape.head_dim * shape.dtype.itemsize))
    most_keys = shape.max_pages * shape.page_size if shape.window is None else shape.window
    num_splits = min(
        _MAX_SPLITS,
        next_power_of_2(cdiv(_PROGRAMS, shape.num_kv_heads)),
        next_power_of_2(cdiv(most_keys, block_keys)),
    )
    return partial(_run, shape, rows, merge_parts, block_keys, num_splits)


def _run(
    shape: AttentionShape,
    rows: Rows,
    merge_parts: MergeParts,
    block_keys: int,
    num_splits: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    rotation: Rotation | None,
    cells: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert q.shape == (1, shape.num_heads, shape.head_dim)
    lse = torch.empty((1, shape.num_heads, num_splits), dtype=torch.float32, device=q.device)
    parts = torch.empty((*lse.shape, shape.head_dim), dtype=torch.float32, device=q.device)
    _row_attend_kernel[(shape.num_kv_heads, num_splits)](
        q,
        k,
        v,
        norms.query if norms else q,
        norms.key if norms else k,
        rotation.table if rotation else cells,
        rotation.positions if rotation else cells,
        cells,
        k_pages,
        v_pages,
        rows.page_tables,
        rows.slots,
        rows.lens,
        q if sinks is None else sinks,
        parts,
        lse,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        rows.page_tables.stride(0),
        norms.eps if norms else 0.0,
        shape.scale,
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim,
        PAGE_SIZE=shape.page_size,
        WINDOW=shape.window or 0,
        SOFT_CAP=shape.soft_cap or 0.0,
        NORM=norms is not None,
        ROTATED=rotation is not None,
        HAS_SINKS=sinks is not None,
        NUM_SPLITS=num_splits,
        BLOCK=max(_LEAST_BLOCK, next_power_of_2(shape.num_heads // shape.num_kv_heads)),
        BLOCK_KEYS=block_keys,
        num_warps=_WARPS,
        num_stages=1,
        **early_launch(q.device),
    )
    return merge_parts(parts, lse, q.new_empty(q.shape))
