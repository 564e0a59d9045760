"""Norm, rotation and cache write as one kernel: a program takes some heads of some tokens."""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery

_MAX_HEADS = 8  # of one token in one program
_PAIRS = 16  # of a token and a head in one program


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
    heads,
    inside,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    STORE: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Some `heads` [N, 1] of tokens at `x_ptr`: normalised, rotated, written back and to the cache, where `inside`.

    The first FIRST features turn with the next FIRST ones (without a rotation they stay), the rest follow.
    """
    x_ptr += heads * head_stride
    pages_ptr += heads * HEAD_DIM
    half = tl.arange(0, HALF_BLOCK)[None, :]
    half_inside = half < FIRST
    rest = tl.arange(0, REST_BLOCK)[None, :]
    rest_inside = rest < HEAD_DIM - 2 * FIRST
    inside_rest = inside & rest_inside
    inside = inside & half_inside
    first = tl.load(x_ptr + half, mask=inside, other=0.0)
    second = tl.load(x_ptr + FIRST + half, mask=inside, other=0.0)
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
@triton.jit(do_not_specialize=["num_tokens"])
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
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs of TOKENS tokens: first their query heads, then their keys, then their values, HEADS at a time."""
    NUM_QUERY_PARTS: tl.constexpr = NUM_HEADS // HEADS + (NUM_HEADS % HEADS != 0)
    NUM_KV_PARTS: tl.constexpr = NUM_KV_HEADS // HEADS + (NUM_KV_HEADS % HEADS != 0)
    STAYS: tl.constexpr = not NORM and ROTATED == 0
    part = tl.program_id(1)
    pairs = tl.arange(0, TOKENS * HEADS)[:, None]
    tokens = (tl.program_id(0) * TOKENS + pairs // HEADS).to(tl.int64)
    heads = pairs % HEADS
    valid = tokens < num_tokens
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    table = table_ptr
    if ROTATED:
        table += tl.load(positions_ptr + tokens, mask=valid, other=0) * (2 * FIRST)
    if part < NUM_QUERY_PARTS:
        if not STAYS:
            heads += part * HEADS
            _prepare_heads(
                q_ptr + tokens * q_stride, q_head_stride, q_weight_ptr, table, k_pages_ptr,
                heads, valid & (heads < NUM_HEADS), eps,
                HEAD_DIM, ROTATED, FIRST, HALF_BLOCK, REST_BLOCK, NORM, True, False,
            )  # fmt: skip
    else:
        rows = tl.load(rows_ptr + tokens, mask=valid, other=0) * (NUM_KV_HEADS * HEAD_DIM)
        if part < NUM_QUERY_PARTS + NUM_KV_PARTS:
            heads += (part - NUM_QUERY_PARTS) * HEADS
            _prepare_heads(
                k_ptr + tokens * k_stride, k_head_stride, k_weight_ptr, table, k_pages_ptr + rows,
                heads, valid & (heads < NUM_KV_HEADS), eps,
                HEAD_DIM, ROTATED, FIRST, HALF_BLOCK, REST_BLOCK, NORM, not STAYS, True,
            )  # fmt: skip
        else:
            heads += (part - NUM_QUERY_PARTS - NUM_KV_PARTS) * HEADS
            _prepare_heads(
                v_ptr + tokens * v_stride, v_head_stride, k_weight_ptr, table, v_pages_ptr + rows,
                heads, valid & (heads < NUM_KV_HEADS), eps,
                HEAD_DIM, False, FIRST, HALF_BLOCK, REST_BLOCK, False, False, True,
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
        tokens = _PAIRS // heads
        _store_kernel[(cdiv(num_tokens, tokens), num_parts)](
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
            num_tokens,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTATED=rotation is not None,
            FIRST=first,
            HEADS=heads,
            TOKENS=tokens,
            HALF_BLOCK=next_power_of_2(first),
            REST_BLOCK=next_power_of_2(max(head_dim - 2 * first, 1)),
            NORM=norms is not None,
            num_warps=8,
            **early_launch(q.device),
        )


BACKEND = TritonQkv()
