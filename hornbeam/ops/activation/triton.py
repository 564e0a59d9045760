"""Gated activations as one kernel: a program per token and stretch of features."""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch
from hornbeam.ops.query import OpQuery
from hornbeam.ops.trial import on_hopper, serves

_BLOCK = 1024
_LEAST_OUTPUTS = 50 * 2**20  # for gates inside a product: with fewer, its last tiles leave too much of the device idle


@Kernel
@triton.jit
def _gated_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr):
    """Rounds the activation before the product, as the reference does."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # gelu(x) is about x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), and (1 + tanh(z)) / 2 is sigmoid(2 z).
    sharp = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide) if GELU else wide
    # The exponential is taken of what is negative: it never overflows.
    small = tl.exp(-tl.abs(sharp))
    share = tl.where(sharp >= 0, 1.0, small) / (1.0 + small)
    active = (wide * share).to(gate.dtype)
    out = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, out.to(gate.dtype), mask=inside)


class TritonActivation:
    """See `Activation`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def silu_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        return _gated(x, gelu=False)

    def silu_mul_product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """See `Activation`."""
        aligned = weight.shape[0] % 16 == weight.shape[1] % 8 == 0
        if x.shape[0] * weight.shape[0] < _LEAST_OUTPUTS or not aligned:
            return None
        multiply = _product(x.dtype, x.device)
        return None if multiply is None else multiply(x, weight)

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        return _gated(x, gelu=True)


def _gated(x: Tensor, *, gelu: bool) -> Tensor:
    assert x.is_contiguous()
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    grid = (num_tokens, cdiv(size, _BLOCK))
    _gated_kernel[grid](x, out, SIZE=size, BLOCK=_BLOCK, GELU=gelu, **early_launch(x.device))
    return out


@cache
def _product(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """`multiply_gated` where it serves."""
    if not on_hopper(dtype, device):
        return None

    def trial() -> tuple[Tensor, Tensor]:
        from hornbeam.ops.activation.gluon_gate import multiply_gated

        x, weight = (torch.rand(size, 256, device=device).to(dtype) - 0.5 for size in (200, 288))
        return multiply_gated(x, weight), ReferenceActivation().silu_mul(x @ weight.T)

    if not serves("gates of long prompts", "products and gates are apart", trial):
        return None
    from hornbeam.ops.activation.gluon_gate import multiply_gated

    return multiply_gated


BACKEND = TritonActivation()
