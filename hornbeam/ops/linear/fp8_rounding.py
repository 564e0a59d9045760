"""Rounding activations to eight-bit floats as kernels of their own, with what comes before it: norm, or gate.

Rows are rounded bit by bit as `fp8_reference.round_rows` does. Scales are stored group by group, all tokens of a group
side by side, as the library's products read them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.linear.contract import SCALE_BLOCK, InputNorm

_GROUPS = 8  # that a program rounds
_ROWS_MULTIPLE = 4


@triton.jit
def _scales(largest, POWER_OF_TWO: tl.constexpr):
    """Of groups whose largest magnitudes are given, float32."""
    scales = tl.div_rn(tl.maximum(largest, 1e-10), 448.0)
    if POWER_OF_TWO:
        scales = ((scales.to(tl.int32, bitcast=True) + 0x7FFFFF) & ~0x7FFFFF).to(tl.float32, bitcast=True)
    return scales


@triton.jit
def _store_rounded(x, out_ptr, scales_ptr, row, groups, scale_stride, SIZE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Groups [G, 128] of a row, float32."""
    scales = _scales(tl.max(tl.abs(x), 1), POWER_OF_TWO)
    x = tl.clamp(x * tl.div_rn(1.0, scales)[:, None], -448.0, 448.0)
    features = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(out_ptr + row * SIZE + features, x.to(tl.float8e4nv), mask=features < SIZE)
    tl.store(scales_ptr + groups.to(tl.int64) * scale_stride + row, scales, mask=groups * 128 < SIZE)


@Kernel
@triton.jit
def _round_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    scale_stride,
    SIZE: tl.constexpr,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EARLY: tl.constexpr,
):
    """GATED: of silu(first half) * second half, rounded where the reference does."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    features = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = features < SIZE
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # a product, which then fetches its first weights
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + features, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + SIZE + features, mask=inside, other=0.0)
        small = tl.exp(-tl.abs(wide))  # of what is negative: it never overflows
        active = (wide * tl.where(wide >= 0, 1.0, small) / (1.0 + small)).to(x.dtype)
        wide = (active.to(tl.float32) * up.to(tl.float32)).to(x.dtype).to(tl.float32)
    _store_rounded(wide, out_ptr, scales_ptr, row, groups, scale_stride, SIZE, POWER_OF_TWO)


@Kernel
@triton.jit
def _round_normed_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    scale_stride,
    eps,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ADD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token: its sum with the residual, and the norm of that, rounded where the reference rounds."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    features = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = features < SIZE
    weight = tl.load(weight_ptr + features, mask=inside, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # a product, which then fetches its first weights
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + features, mask=inside, other=0.0)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + features, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * SIZE + features, x, mask=inside)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / SIZE + eps)
    wide = (weight.to(tl.float32) * wide.to(weight.dtype).to(tl.float32)).to(dtype).to(tl.float32)
    _store_rounded(wide, out_ptr, scales_ptr, row, groups, scale_stride, SIZE, POWER_OF_TWO)


def round_rows(x: Tensor, *, power_of_two: bool, gated: bool = False) -> tuple[Tensor, Tensor]:
    """[T, K] -> [R, K] float8_e4m3fn and scales [R, ceil(K / 128)] float32; gated: of silu(x[:, :K]) * x[:, K:].

    R is T rounded up to a multiple of 4, which the library asks for; what is behind the last row is not written.
    """
    num_rows, size = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    assert x.stride(1) == 1, "features must be adjacent"
    out, scales = _empty_rounded(x, num_rows, size)
    groups = min(_GROUPS, next_power_of_2(scales.shape[1]))
    _round_kernel[(num_rows, cdiv(scales.shape[1], groups))](
        x,
        out,
        scales,
        x.stride(0),
        scales.stride(1),
        SIZE=size,
        GATED=gated,
        GROUPS=groups,
        POWER_OF_TWO=power_of_two,
        **early_launch(x.device),
    )
    return out, scales


def round_normed(
    x: Tensor, residual: Tensor | None, norm: InputNorm, *, power_of_two: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What `round_rows` makes of norm(x + residual), and x + residual [T, K]."""
    num_rows, size = x.shape
    assert x.stride(1) == 1, "features must be adjacent"
    assert residual is None or residual.is_contiguous()
    total = x if residual is None else torch.empty_like(residual)
    out, scales = _empty_rounded(x, num_rows, size)
    groups = next_power_of_2(scales.shape[1])
    _round_normed_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        norm.weight,
        total,
        out,
        scales,
        x.stride(0),
        scales.stride(1),
        norm.eps,
        SIZE=size,
        GROUPS=groups,
        ADD=residual is not None,
        POWER_OF_TWO=power_of_two,
        num_warps=min(max(groups // 4, 1), 16),
        **early_launch(x.device),
    )
    return (out, scales), total


def _empty_rounded(x: Tensor, num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    num_rows += -num_rows % _ROWS_MULTIPLE
    out = torch.empty((num_rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((-(-size // SCALE_BLOCK), num_rows), dtype=torch.float32, device=x.device)
    return out, scales.T
