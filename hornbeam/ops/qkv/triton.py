"""Norm, rotation and cache write as one kernel: a program takes some heads of one token."""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery

_MAX_HEADS = 8  # of one program


@triton.jit
def normalised(x, weights, inside, factor):
    """Features of heads, [heads, features], by their weights at `weights`; rounds where the reference does."""
    weight = tl.load(weights, mask=inside, other=0.0)
    return (weight.to(tl.float32) * (x.to(tl.float32) * factor).to(weight.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def _prepare_heads(
    x_ptr,
    head_stride,
    weight_ptr,
    table_ptr,
    pages_ptr,
    first_head,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    STORE: tl.constexpr,
    CACHE: tl.constexpr,
):
    """HEADS heads of one token from `first_head` on: normalised, rotated, written back and to the cache.

    The first FIRST features turn with the next FIRST ones (without a rotation they stay), the rest follow.
    """
    heads = first_head + tl.arange(0, HEADS)[:, None]
    x_ptr += heads * head_stride
    pages_ptr += heads * HEAD_DIM
    half = tl.arange(0, HALF_BLOCK)[None, :]
    half_inside = half < FIRST
    inside = (heads < num_heads) & half_inside
    first = tl.load(x_ptr + half, mask=inside, other=0.0)
    second = tl.load(x_ptr + FIRST + half, mask=inside, other=0.0)
    rest = tl.arange(0, REST_BLOCK)[None, :]
    rest_inside = rest < HEAD_DIM - 2 * FIRST
    inside_rest = (heads < num_heads) & rest_inside
    tail = tl.load(x_ptr + 2 * FIRST + rest, mask=inside_rest, other=0.0)
    if NORM:
        wide_first, wide_second, wide_tail = first.to(tl.float32), second.to(tl.float32), tail.to(tl.float32)
        squares = tl.sum(wide_first * wide_first + wide_second * wide_second, 1) + tl.sum(wide_tail * wide_tail, 1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = normalised(first, weight_ptr + half, half_inside, factor)
        second = normalised(second, weight_ptr + FIRST + half, half_inside, factor)
        tail = normalised(tail, weight_ptr + 2 * FIRST + rest, rest_inside, factor)
    if ROTATED:
        cos = tl.load(table_ptr + half, mask=half_inside, other=0.0)
        sin = tl.load(table_ptr + FIRST + half, mask=half_inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
    if STORE:
        tl.store(x_ptr + half, first, mask=inside)
        tl.store(x_ptr + FIRST + half, second, mask=inside)
        if NORM:
            tl.store(x_ptr + 2 * FIRST + rest, tail, mask=inside_rest)
    if CACHE:
        tl.store(pages_ptr + half, first, mask=inside)
        tl.store(pages_ptr + FIRST + half, second, mask=inside)
        tl.store(pages_ptr + 2 * FIRST + rest, tail, mask=inside_rest)


@Kernel
@triton.jit
def _store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    positions_ptr,
    k_pages_ptr,
    v_pages_ptr,
    rows_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs of a token: first its query heads, then its keys, then its values, HEADS at a time."""
    NUM_QUERY_PARTS: tl.constexpr = NUM_HEADS // HEADS + (NUM_HEADS % HEADS != 0)
    NUM_KV_PARTS: tl.constexpr = NUM_KV_HEADS // HEADS + (NUM_KV_HEADS % HEADS != 0)
    STAYS: tl.constexpr = not NORM and ROTATED == 0
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + token) * (NUM_KV_HEADS * HEAD_DIM)
    table = table_ptr
    if ROTATED:
        table += tl.load(positions_ptr + token) * (2 * FIRST)
    if part < NUM_QUERY_PARTS:
        if not STAYS:
            _prepare_heads(
                q_ptr + token * q_stride, q_head_stride, q_weight_ptr, table, k_pages_ptr, part * HEADS, NUM_HEADS, eps,
                HEAD_DIM, ROTATED, FIRST, HEADS, HALF_BLOCK, REST_BLOCK, NORM, True, False,
            )  # fmt: skip
    elif part < NUM_QUERY_PARTS + NUM_KV_PARTS:
        _prepare_heads(
            k_ptr + token * k_stride, k_head_stride, k_weight_ptr, table, k_pages_ptr + row,
            (part - NUM_QUERY_PARTS) * HEADS, NUM_KV_HEADS, eps,
            HEAD_DIM, ROTATED, FIRST, HEADS, HALF_BLOCK, REST_BLOCK, NORM, not STAYS, True,
        )  # fmt: skip
    else:
        _prepare_heads(
            v_ptr + token * v_stride, v_head_stride, k_weight_ptr, table, v_pages_ptr + row,
            (part - NUM_QUERY_PARTS - NUM_KV_PARTS) * HEADS, NUM_KV_HEADS, eps,
            HEAD_DIM, False, FIRST, HEADS, HALF_BLOCK, REST_BLOCK, False, False, True,
        )  # fmt: skip


class TritonQkv:
    """See `Qkv`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: Tensor,
    ) -> None:
        """See `Qkv`."""
        assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "a head's features must be adjacent"
        assert k_pages.is_contiguous()
        assert v_pages.is_contiguous()
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        first = (rotation.table.shape[1] if rotation else head_dim) // 2
        heads = min(_MAX_HEADS, next_power_of_2(num_kv_heads))
        num_parts = cdiv(num_heads, heads) + 2 * cdiv(num_kv_heads, heads)
        _store_kernel[(num_tokens, num_parts)](
            q,
            k,
            v,
            norms.query if norms else q,
            norms.key if norms else k,
            rotation.table if rotation else rows,
            rotation.positions if rotation else rows,
            k_pages,
            v_pages,
            rows,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            norms.eps if norms else 0.0,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTATED=rotation is not None,
            FIRST=first,
            HEADS=heads,
            HALF_BLOCK=next_power_of_2(first),
            REST_BLOCK=next_power_of_2(max(head_dim - 2 * first, 1)),
            NORM=norms is not None,
            num_warps=2,
            **early_launch(q.device),
        )


BACKEND = TritonQkv()
