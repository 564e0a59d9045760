"""RMS normalisation as one kernel, the addition of parts and the residual included: one program per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2
from hornbeam.ops.query import OpQuery


@Kernel
@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    part_stride,
    eps,
    PARTS: tl.constexpr,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rounds where the reference does: the sum, and the normalised value before the weight."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * SIZE + columns, x, mask=inside)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    out = weight.to(tl.float32) * wide.to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, out.to(x.dtype), mask=inside)


class TritonNorm:
    """See `Norm`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        return _launch(x, x, weight, eps, add=False)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        return _launch(x, residual, weight, eps, add=True)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    num_tokens, size = residual.shape
    parts = x if x.ndim == 3 else x[None]
    assert parts.stride(2) == 1, "features must be adjacent"
    assert not add or residual.is_contiguous()
    out = torch.empty((num_tokens, size), dtype=residual.dtype, device=x.device)
    block = next_power_of_2(size)
    _rms_norm_kernel[(num_tokens,)](
        parts,
        residual,
        weight,
        out,
        parts.stride(1),
        parts.stride(0),
        eps,
        PARTS=parts.shape[0],
        ADD=add,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        **early_launch(x.device),
    )
    return out


BACKEND = TritonNorm()
