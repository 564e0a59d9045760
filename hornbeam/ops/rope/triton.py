"""Rotary position embedding as one kernel for queries and keys: one program per token."""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.query import OpQuery


@triton.jit
def _rotate_heads(
    x_ptr,
    head_stride,
    cos,
    sin,
    dims,
    HALF: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):
    """Turn the NUM_HEADS heads of one token, in place. cos, sin: [1, HALF padded]."""
    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    inside = (heads < NUM_HEADS) & (dims < HALF)
    pointers = x_ptr + heads * head_stride + dims
    first = tl.load(pointers, mask=inside, other=0.0)
    second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = first.dtype
    first = first.to(tl.float32)
    tl.store(pointers, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(pointers + HALF, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rotate_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    table_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    HALF: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """All heads of one token."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HALF_BLOCK)[None, :]
    entry = table_ptr + tl.load(positions_ptr + token) * (2 * HALF) + dims
    cos = tl.load(entry, mask=dims < HALF, other=0.0)
    sin = tl.load(entry + HALF, mask=dims < HALF, other=0.0)
    _rotate_heads(q_ptr + token * q_stride, q_head_stride, cos, sin, dims, HALF, NUM_HEADS, HEADS_BLOCK)
    _rotate_heads(k_ptr + token * k_stride, k_head_stride, cos, sin, dims, HALF, NUM_KV_HEADS, KV_HEADS_BLOCK)


class TritonRope:
    """See `Rope`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
        """See `Rope`."""
        assert q.stride(2) == k.stride(2) == 1, "a head's features must be adjacent"
        (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
        _rotate_kernel[(num_tokens,)](
            q,
            k,
            positions,
            table,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            HALF=head_dim // 2,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            HEADS_BLOCK=triton.next_power_of_2(num_heads),
            KV_HEADS_BLOCK=triton.next_power_of_2(num_kv_heads),
            **early_launch(q.device),
        )


BACKEND = TritonRope()
