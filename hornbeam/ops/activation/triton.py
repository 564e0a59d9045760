"""Gated activations as one kernel: a program per token and stretch of features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.query import OpQuery

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Rounds silu before the product, as the reference does."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    out = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, out.to(gate.dtype), mask=inside)


class TritonActivation:
    """See `Activation`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def silu_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        assert x.is_contiguous()
        num_tokens, size = x.shape[0], x.shape[1] // 2
        out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        _silu_mul_kernel[grid](x, out, SIZE=size, BLOCK=_BLOCK, **early_launch(x.device))
        return out


BACKEND = TritonActivation()
