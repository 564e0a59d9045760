"""Products of bfloat16 activations with float32 weights, of which nothing is lost.

A float32 number is the sum of three of bfloat16, high, middle and low, and products of those with activations are
exact in float32: so matrix units, which would round the weights, take them in three parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import early_launch


@triton.jit
def _add_product(total, tile, x):
    """total + tile x, smallest parts first; tile is float32."""
    high = tile.to(x.dtype)
    rest = tile - high.to(tl.float32)
    middle = rest.to(x.dtype)
    low = (rest - middle.to(tl.float32)).to(x.dtype)
    total = tl.dot(low, x, total)
    total = tl.dot(middle, x, total)
    return tl.dot(high, x, total)


@triton.jit
def _load(pointers, valid, inside, EVEN: tl.constexpr):
    """A tile with the features of its input along the side of `inside`."""
    if EVEN:
        return tl.load(pointers, mask=valid, other=0.0)
    return tl.load(pointers, mask=valid & inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _wide_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs of ROWS rows, as W x^T. The first tile of weights does not wait for x."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid, present = (columns < N)[:, None], (rows < num_rows)[None, :]
    features = tl.arange(0, BLOCK_K)
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    inputs = x_ptr + rows[None, :].to(tl.int64) * x_stride + features[:, None]
    tile = _load(weights, valid, (features < K)[None, :], EVEN)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    total = _add_product(total, tile, _load(inputs, present, (features < K)[:, None], EVEN))
    for begin in range(BLOCK_K, K, BLOCK_K):
        inside = begin + features < K
        tile = _load(weights + begin, valid, inside[None, :], EVEN)
        total = _add_product(total, tile, _load(inputs + begin, present, inside[:, None], EVEN))
    out = out_ptr + rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(out, total, mask=valid & present)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """See `LinearProduct.wide`: x in bfloat16, of two rows or more."""
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    assert weight.is_contiguous()
    assert x.stride(1) == 1
    out = torch.empty((num_rows, num_out), dtype=torch.float32, device=x.device)
    block_n, block_k, rows, num_warps, num_stages = _tile(num_rows)
    _wide_kernel[(triton.cdiv(num_out, block_n), triton.cdiv(num_rows, rows))](
        x,
        weight,
        out,
        num_rows,
        x.stride(0),
        K=num_in,
        N=num_out,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ROWS=rows,
        num_warps=num_warps,
        num_stages=num_stages,
        **early_launch(x.device),
    )
    return out


def _tile(num_rows: int) -> tuple[int, int, int, int, int]:
    """Outputs, features and rows of a program, its warps and stages."""
    if num_rows <= 512:
        return 16, 128, 16, 2, 5
    return 64, 64, 64, 4, 4
