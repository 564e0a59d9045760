"""Products with a single row, which only read the weights once: as near to memory bandwidth as it gets.

The vendor's library takes matrix units to a single row, too, and splits some shapes with a second kernel; here each
program sums a few outputs on plain lanes, and its first weights arrive while the kernel ahead still runs. More rows go
to the library.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.query import OpQuery


@triton.jit
def _load_weights(pointers, valid, inside, EVEN: tl.constexpr):
    """A tile of weights. Masks cost bandwidth, so there are none where the tiles divide the matrix."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def _row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs. The first tile of weights does not wait for x."""
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % BLOCK_K == 0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    features = tl.arange(0, BLOCK_K)
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    tile = _load_weights(weights, valid, features < K, EVEN)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + features, mask=features < K, other=0.0)
    total = tile.to(tl.float32) * x.to(tl.float32)[None, :]
    for begin in range(BLOCK_K, K, BLOCK_K):
        inside = begin + features < K
        tile = _load_weights(weights + begin, valid, inside, EVEN)
        x = tl.load(x_ptr + begin + features, mask=inside, other=0.0)
        total += tile.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=valid)


class TritonLinear:
    """See `LinearProduct`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearProduct`."""
        if x.shape[0] != 1:
            return F.linear(x, weight, bias)
        num_out, num_in = weight.shape
        assert weight.is_contiguous()
        assert x.stride(1) == 1
        out = torch.empty((1, num_out), dtype=x.dtype, device=x.device)
        block_n, block_k, num_warps = _tile(num_in, num_out)
        _row_kernel[(triton.cdiv(num_out, block_n),)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            K=num_in,
            N=num_out,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            HAS_BIAS=bias is not None,
            num_warps=num_warps,
            **early_launch(x.device),
        )
        return out


def _tile(num_in: int, num_out: int) -> tuple[int, int, int]:
    """Outputs and inputs per program and its warps: the best of a search on an H200 over the shapes of an 8B model."""
    if num_in > 8192:
        return 8, 512, 8
    if 4096 < num_out <= 8192:
        return 8, 256, 4
    return 4, min(2048, triton.next_power_of_2(num_in)), 8


BACKEND = TritonLinear()
