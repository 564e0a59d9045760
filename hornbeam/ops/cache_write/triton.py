"""The cache write as one kernel for keys and values: one program per token."""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.query import OpQuery


@triton.jit
def _write_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    rows_ptr,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Copy the SIZE = heads * HEAD_DIM features of one token's key and value."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    heads, dims = columns // HEAD_DIM, columns % HEAD_DIM
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.load(k_ptr + token * k_stride + heads * k_head_stride + dims, mask=inside)
    v = tl.load(v_ptr + token * v_stride + heads * v_head_stride + dims, mask=inside)
    target = tl.load(rows_ptr + token) * SIZE + columns
    tl.store(k_pages_ptr + target, k, mask=inside)
    tl.store(v_pages_ptr + target, v, mask=inside)


class TritonCacheWrite:
    """See `CacheWrite`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, rows: Tensor) -> None:
        """See `CacheWrite`."""
        assert k.stride(2) == v.stride(2) == 1, "a head's features must be adjacent"
        assert k_pages.is_contiguous()
        assert v_pages.is_contiguous()
        num_tokens, num_heads, head_dim = k.shape
        size = num_heads * head_dim
        _write_kernel[(num_tokens,)](
            k,
            v,
            k_pages,
            v_pages,
            rows,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            HEAD_DIM=head_dim,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
            **early_launch(k.device),
        )


BACKEND = TritonCacheWrite()
