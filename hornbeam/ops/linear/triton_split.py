"""Products with few outputs, as those of gates: many programs each take a stretch of the inputs, to fill the device.

The sums of the stretches stay apart, for the kernel behind to add up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch

NUM_PARTS = 16
_MOST_ROWS = 256  # more fill the device without
_ROWS = 16  # of a program
_OUTPUTS = 128  # likewise


@Kernel
@triton.jit(do_not_specialize=["num_rows"])
def _split_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A tile of x W^T over SPAN inputs; out: [K / SPAN, num_rows, N] float32."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    features = part * SPAN + tl.arange(0, BLOCK_K)
    weights = weight_ptr + columns[:, None] * K + features[None, :]
    tile = tl.load(weights, mask=columns[:, None] < N, other=0.0)  # of the model, so it need not wait
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, SPAN, BLOCK_K):
        x = tl.load(x_ptr + rows * K + begin + features[None, :], mask=rows < num_rows, other=0.0)
        total = tl.dot(x, tile.T, total, input_precision="ieee")
        following = begin + BLOCK_K
        tile = tl.load(weights + following, mask=columns[:, None] < tl.where(following < SPAN, N, 0), other=0.0)
    out = out_ptr + (part * num_rows + rows) * N + columns[None, :]
    tl.store(out, total, mask=(rows < num_rows) & (columns < N)[None, :])


def splits(num_rows: int, num_in: int) -> bool:
    """Whether so many inputs can be cut into stretches, and for so many rows should be."""
    return 0 < num_rows <= _MOST_ROWS and num_in % (64 * NUM_PARTS) == 0


def split_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> sums over stretches of the inputs, [NUM_PARTS, T, N] float32."""
    num_rows, (num_out, num_in) = len(x), weight.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = torch.empty((NUM_PARTS, num_rows, num_out), dtype=torch.float32, device=x.device)
    span = num_in // NUM_PARTS
    _split_kernel[(cdiv(num_rows, _ROWS), cdiv(num_out, _OUTPUTS), NUM_PARTS)](
        x,
        weight,
        out,
        num_rows,
        K=num_in,
        N=num_out,
        SPAN=span,
        BLOCK_M=_ROWS,
        BLOCK_N=_OUTPUTS,
        BLOCK_K=128 if span % 128 == 0 else 64,
        num_warps=4,
        **early_launch(x.device),
    )
    return out
