"""Products of eight-bit floats: a kernel for one row, one for several, and the library's for many.

For a single row each program rounds the whole input again, with the norm ahead of it: that is less work than another
kernel would be. Its weights are widened on plain lanes. Several rows are rounded by a kernel of their own, and
multiplied on matrix units, 128 features at a time, since then the scales change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.activation.triton import BACKEND as ACTIVATION
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.linear.contract import SCALE_BLOCK, Fp8Weight, InputNorm
from hornbeam.ops.linear.fp8_rounding import round_normed, round_rows, scales_of
from hornbeam.ops.query import OpQuery


@triton.jit
def _load_input(x_ptr, residual_ptr, features, SIZE: tl.constexpr, ADD: tl.constexpr):
    """x + residual, rounded to their dtype."""
    x = tl.load(x_ptr + features, mask=features < SIZE, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + features, mask=features < SIZE, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _load_weights(pointers, valid, features, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile [BLOCK_N, G, 128]. Masks cost bandwidth, so there are none where the tiles divide the matrix."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid[:, None, None] & (features < K)[None, :, :], other=0.0)


@triton.jit
def _accumulate(
    total,
    up_total,
    tile,
    up_tile,
    x_ptr,
    residual_ptr,
    sum_ptr,
    norm_weight_ptr,
    scales_ptr,
    up_scales_ptr,
    first_group,
    groups,
    factor,
    K: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """Add one tile's products with x + residual, normalised and rounded. The first program keeps the sum for others."""
    groups = first_group + groups
    features = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = _load_input(x_ptr, residual_ptr, features, K, ADD)
    if ADD and tl.program_id(0) == 0:
        tl.store(sum_ptr + features, x, mask=features < K)
    wide = x.to(tl.float32)
    if NORM:
        weight = tl.load(norm_weight_ptr + features, mask=features < K, other=0.0)
        wide = weight.to(tl.float32) * (wide * factor).to(weight.dtype).to(tl.float32)
        wide = wide.to(x.dtype).to(tl.float32)
    scales = scales_of(tl.max(tl.abs(wide), 1), POWER_OF_TWO)
    rounded = tl.clamp(wide * tl.div_rn(1.0, scales)[:, None], -448.0, 448.0).to(tl.float8e4nv).to(tl.float32)
    inside = groups * 128 < K
    both = scales * tl.load(scales_ptr + groups, mask=inside, other=0.0)
    total += tile.to(tl.float32) * (rounded * both[:, None])[None, :, :]
    if GATED:
        both = scales * tl.load(up_scales_ptr + groups, mask=inside, other=0.0)
        up_total += up_tile.to(tl.float32) * (rounded * both[:, None])[None, :, :]
    return total, up_total


@triton.jit
def _row_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    eps,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N of N outputs, which share their scales. The first tile of weights does not wait for x."""
    NUM_GROUPS: tl.constexpr = (K + 127) // 128
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % (GROUPS * 128) == 0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    groups = tl.arange(0, GROUPS)
    features = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    weights = weight_ptr + columns[:, None, None].to(tl.int64) * K + features[None, :, :]
    up_weights = weights + N * K if GATED else weights
    scales = scales_ptr + tl.program_id(0) * BLOCK_N // 128 * NUM_GROUPS
    up_scales = scales + N // 128 * NUM_GROUPS
    tile = _load_weights(weights, valid, features, K, EVEN)
    up_tile = _load_weights(up_weights, valid, features, K, EVEN) if GATED else tile
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    factor = 1.0
    if NORM:
        squares = tl.zeros([GROUPS, 128], tl.float32)
        for first in range(0, NUM_GROUPS, GROUPS):
            x = _load_input(x_ptr, residual_ptr, first * 128 + features, K, ADD).to(tl.float32)
            squares += x * x
        factor = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    total = tl.zeros([BLOCK_N, GROUPS, 128], tl.float32)
    up_total = tl.zeros([BLOCK_N, GROUPS, 128], tl.float32)
    total, up_total = _accumulate(
        total, up_total, tile, up_tile, x_ptr, residual_ptr, sum_ptr, norm_weight_ptr,
        scales, up_scales, 0, groups, factor, K, ADD, NORM, GATED, POWER_OF_TWO,
    )  # fmt: skip
    for first in range(GROUPS, NUM_GROUPS, GROUPS):
        begin = first * 128
        tile = _load_weights(weights + begin, valid, begin + features, K, EVEN)
        up_tile = _load_weights(up_weights + begin, valid, begin + features, K, EVEN) if GATED else tile
        total, up_total = _accumulate(
            total, up_total, tile, up_tile, x_ptr, residual_ptr, sum_ptr, norm_weight_ptr,
            scales, up_scales, first, groups, factor, K, ADD, NORM, GATED, POWER_OF_TWO,
        )  # fmt: skip
    out, up = tl.sum(tl.sum(total, 2), 1), tl.sum(tl.sum(up_total, 2), 1)
    dtype = out_ptr.dtype.element_ty
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + N + columns, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        gate = out.to(dtype).to(tl.float32)
        small = tl.exp(-tl.abs(gate))  # of what is negative: it never overflows
        active = (gate * tl.where(gate >= 0, 1.0, small) / (1.0 + small)).to(dtype)
        out = active.to(tl.float32) * up.to(dtype).to(tl.float32)
    tl.store(out_ptr + columns, out.to(dtype), mask=valid)


@triton.jit
def _tile_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs, which share their scales, of ROWS rows, as W x^T. Programs of equal weights are neighbours."""
    NUM_GROUPS: tl.constexpr = (K + 127) // 128
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % 128 == 0
    num_blocks = tl.cdiv(num_rows, ROWS)
    column_block, row_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    features = tl.arange(0, 128)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    inputs = x_ptr + rows[None, :].to(tl.int64) * K + features[:, None]
    scales = scales_ptr + column_block * BLOCK_N // 128 * NUM_GROUPS
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    both = tl.load(x_scales_ptr + rows, mask=present, other=0.0) * tl.load(scales)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for group in range(NUM_GROUPS):
        if EVEN:
            tile = tl.load(weights + group * 128)
            x = tl.load(inputs + group * 128, mask=present[None, :], other=0.0)
        else:
            inside = group * 128 + features < K
            tile = tl.load(weights + group * 128, mask=valid[:, None] & inside[None, :], other=0.0)
            x = tl.load(inputs + group * 128, mask=present[None, :] & inside[:, None], other=0.0)
        # Scales are not buffered ahead as tiles are: those of the next group are fetched while this one is multiplied.
        following = tl.minimum(group + 1, NUM_GROUPS - 1)
        next_rows = tl.load(x_scales_ptr + following * num_rows + rows, mask=present, other=0.0)
        next_scale = tl.load(scales + following)
        total += tl.dot(tile, x) * both[None, :]
        both = next_rows * next_scale
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)[:, None]
    places = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(places, tl.trans(total).to(out_ptr.dtype.element_ty), mask=present[:, None] & valid[None, :])


class TritonFp8:
    """See `Fp8Product`."""

    fused_rows = 2**31 - 1
    gated_rows = 1

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices that multiply such numbers."""
        if reason := needs_cuda(query):
            return reason
        return None if torch.cuda.get_device_capability() >= (8, 9) else "needs compute capability 8.9"

    def linear(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        if x.shape[0] == 1:
            return _single_row(x, None, None, weight, bias, gated=False)[0]
        return _rounded_product(round_rows(x, power_of_two=weight.power_of_two), weight, bias, x.dtype)

    def gated(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        rounded = round_rows(x, power_of_two=weight.power_of_two, gated=True)
        return _rounded_product(rounded, weight, bias, x.dtype)

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm,
        weight: Fp8Weight,
        bias: Tensor | None,
        *,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Fp8Product`."""
        if x.shape[0] == 1:
            return _single_row(x, residual, norm, weight, bias, gated=gated)
        rounded, total = round_normed(x, residual, norm, power_of_two=weight.power_of_two)
        out = _rounded_product(rounded, weight, bias, x.dtype)
        return ACTIVATION.silu_mul(out) if gated else out, total


def _single_row(
    x: Tensor, residual: Tensor | None, norm: InputNorm | None, weight: Fp8Weight, bias: Tensor | None, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """See `Fp8Product.normed`."""
    num_out, num_in = weight.values.shape
    assert weight.values.is_contiguous()
    assert weight.scales.is_contiguous()
    assert x.shape[0] == x.stride(1) == 1
    if gated:
        num_out //= 2
    out = torch.empty((1, num_out), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty((1, num_in), dtype=x.dtype, device=x.device)
    block_n, groups, num_warps = single_row_tile(num_in, num_out, gated=gated)
    _row_kernel[(triton.cdiv(num_out, block_n),)](
        x,
        x if residual is None else residual,
        x if norm is None else norm.weight,
        weight.values,
        weight.scales,
        x if bias is None else bias,
        out,
        total,
        0.0 if norm is None else norm.eps,
        K=num_in,
        N=num_out,
        BLOCK_N=block_n,
        GROUPS=groups,
        HAS_BIAS=bias is not None,
        ADD=residual is not None,
        NORM=norm is not None,
        GATED=gated,
        POWER_OF_TWO=weight.power_of_two,
        num_warps=num_warps,
        **early_launch(x.device),
    )
    return out, total


def _rounded_product(
    rounded: tuple[Tensor, Tensor], weight: Fp8Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Of rows as `round_rows` leaves them."""
    values, scales = rounded
    num_rows, (num_out, num_in) = len(values), weight.values.shape
    assert weight.values.is_contiguous()
    assert weight.scales.is_contiguous()
    out = torch.empty((num_rows, num_out), dtype=dtype, device=values.device)
    block_n, rows, num_warps, num_stages = several_rows_tile(num_rows, num_in, num_out)
    _tile_kernel[(triton.cdiv(num_out, block_n) * triton.cdiv(num_rows, rows),)](
        values,
        scales,
        weight.values,
        weight.scales,
        weight.scales if bias is None else bias,
        out,
        num_rows,
        K=num_in,
        N=num_out,
        BLOCK_N=block_n,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        num_warps=num_warps,
        num_stages=num_stages,
        **early_launch(values.device),
    )
    return out


def single_row_tile(num_in: int, num_out: int, *, gated: bool) -> tuple[int, int, int]:
    """Outputs and groups of inputs per program, and its warps."""
    groups = min(32, triton.next_power_of_2(-(-num_in // SCALE_BLOCK)))
    return 2 if gated else 4, groups, min(8, groups)


def several_rows_tile(num_rows: int, num_in: int, num_out: int) -> tuple[int, int, int, int]:
    """Outputs and rows per program, its warps and stages."""
    if num_rows <= 16:
        return 32, 16, 4, 8
    if num_rows <= 32:
        return 32, 32, 4, 8
    if num_rows <= 64:
        return 64, 64, 4, 5
    return 128, 128, 8, 4


BACKEND = TritonFp8()
