"""Products of eight-bit floats: a kernel for few rows, the library's for many.

Rows are rounded by kernels of their own, together with the norm or the gate ahead of the product. Then 128 features at
a time are multiplied on matrix units, and scaled, since scales change from group to group.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch
from hornbeam.ops.linear.contract import SCALE_BLOCK, Fp8Weight, InputNorm
from hornbeam.ops.linear.fp8_rounding import round_normed, round_rows
from hornbeam.ops.query import OpQuery

_LIBRARY_ROWS = 128  # from which on it is faster
_PROGRAMS = 224  # that share a product of few rows
_LEAST_GROUPS = 8  # of features, of each of them
_GROUPS_AHEAD = 4  # of weights that a program fetches before the kernel ahead has ended
_MAX_SPLIT_TILES = _PROGRAMS // 2


@triton.jit
def _fetch(lines):
    """Bring lines of 128 bytes from memory to the device's cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@Kernel
@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    scale_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs, which share their scales, of ROWS rows, as W x^T. Programs of equal weights are neighbours.

    SPLITS programs share the features; the last one to be done adds up what they found, always in the same order.
    """
    NUM_GROUPS: tl.constexpr = (K + 127) // 128
    PER_SPLIT: tl.constexpr = (NUM_GROUPS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % 128 == 0
    num_blocks = tl.cdiv(num_rows, ROWS)
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    column_block, row_block = tile // num_blocks, tile % num_blocks
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    features = tl.arange(0, 128)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    inputs = x_ptr + rows[None, :].to(tl.int64) * K + features[:, None]
    scales = scales_ptr + column_block * BLOCK_N // 128 * NUM_GROUPS
    first = split * PER_SPLIT
    end = tl.minimum(first + PER_SPLIT, NUM_GROUPS)
    if EARLY:
        ahead = tl.minimum(first + tl.arange(0, AHEAD), NUM_GROUPS - 1)
        lines = weight_ptr + tl.minimum(columns, N - 1)[:, None].to(tl.int64) * K + ahead[None, :] * 128
        _fetch(lines)  # while the kernel ahead still runs
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_scales = tl.load(x_scales_ptr + first * scale_stride + rows, mask=present, other=0.0)
    scale = tl.load(scales + first)
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for group in range(first, end):
        if EVEN:
            weight = tl.load(weights + group * 128)
            x = tl.load(inputs + group * 128, mask=present[None, :], other=0.0)
        else:
            inside = group * 128 + features < K
            weight = tl.load(weights + group * 128, mask=valid[:, None] & inside[None, :], other=0.0)
            x = tl.load(inputs + group * 128, mask=present[None, :] & inside[:, None], other=0.0)
        # Scales are not buffered ahead as tiles are: those of the next group are fetched while this one is multiplied.
        following = tl.minimum(group + 1, NUM_GROUPS - 1)
        next_row_scales = tl.load(x_scales_ptr + following * scale_stride + rows, mask=present, other=0.0)
        next_scale = tl.load(scales + following)
        total += tl.dot(weight, x) * (row_scales * scale)[None, :]
        row_scales, scale = next_row_scales, next_scale
    last = True
    if SPLITS > 1:
        places = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        parts = parts_ptr + tile * (SPLITS * BLOCK_N * ROWS) + places
        tl.store(parts + split * (BLOCK_N * ROWS), total)
        tl.debug_barrier()  # all of the part is written before it is counted
        last = tl.atomic_add(counters_ptr + tile, 1) == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.store(counters_ptr + tile, 0)  # for the next product
            total = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for part in range(SPLITS):
                total += tl.load(parts + part * (BLOCK_N * ROWS), cache_modifier=".cg")
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)[:, None]
        outputs = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(outputs, tl.trans(total).to(out_ptr.dtype.element_ty), mask=present[:, None] & valid[None, :])


class TritonFp8:
    """See `Fp8Product`."""

    fused_rows = 2**31 - 1

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices that multiply such numbers."""
        if reason := needs_cuda(query):
            return reason
        return None if torch.cuda.get_device_capability() >= (8, 9) else "needs compute capability 8.9"

    def linear(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        return _product(x, round_rows(x, power_of_two=weight.power_of_two), weight, bias)

    def gated(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        return _product(x, round_rows(x, power_of_two=weight.power_of_two, gated=True), weight, bias)

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, weight: Fp8Weight, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Fp8Product`."""
        rounded, total = round_normed(x, residual, norm, power_of_two=weight.power_of_two)
        return _product(x, rounded, weight, bias), total


def _product(x: Tensor, rounded: tuple[Tensor, Tensor], weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Of the rows of x, as `round_rows` leaves them."""
    assert weight.values.is_contiguous()
    assert weight.scales.is_contiguous()
    if _library_serves(x, weight):
        return _library_product(x, rounded, weight, bias)
    num_rows, (num_out, num_in) = len(x), weight.values.shape
    values, scales = rounded
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    tile = choose_tile(num_rows, num_in, num_out)
    num_tiles = cdiv(num_out, tile.block_n) * cdiv(num_rows, tile.rows)
    parts, counters = out, _counters(x.device)
    if tile.splits > 1:
        assert num_tiles <= len(counters)
        parts = torch.empty(num_tiles * tile.splits * tile.block_n * tile.rows, device=x.device)
    _tile_kernel[(num_tiles * tile.splits,)](
        values,
        scales,
        weight.values,
        weight.scales,
        bias,
        out,
        parts,
        counters,
        num_rows,
        scales.stride(1),
        K=num_in,
        N=num_out,
        BLOCK_N=tile.block_n,
        ROWS=tile.rows,
        SPLITS=tile.splits,
        AHEAD=_GROUPS_AHEAD,
        HAS_BIAS=bias is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(x.device),
    )
    return out


@cache
def _counters(device: torch.device) -> Tensor:
    """Of the programs that are done, for each tile: zeros, which every product leaves behind."""
    return torch.zeros(_MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def _library_serves(x: Tensor, weight: Fp8Weight) -> bool:
    """Only Hopper's library has such products, of matrices that its loads divide."""
    num_out, num_in = weight.values.shape
    divides = num_out % 16 == 0 and num_in % (4 * SCALE_BLOCK) == 0
    return len(x) >= _LIBRARY_ROWS and divides and x.dtype == torch.bfloat16 and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _library_product(x: Tensor, rounded: tuple[Tensor, Tensor], weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    values, scales = rounded
    out = torch._scaled_mm(values, weight.values.T, scale_a=scales, scale_b=weight.scales.T, out_dtype=x.dtype)
    return out[: len(x)] if bias is None else out[: len(x)].add_(bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Tile:
    """What a program computes, and how."""

    block_n: int  # outputs; a divisor of 128
    rows: int
    splits: int  # programs that share the inputs
    num_warps: int = 4
    num_stages: int = 4


def choose_tile(num_rows: int, num_in: int, num_out: int) -> Fp8Tile:
    """Few rows: enough programs to read weights from all of memory at once. By searches on an H200."""
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    num_tiles = cdiv(num_out, SCALE_BLOCK) * cdiv(num_rows, rows)
    groups = cdiv(num_in, SCALE_BLOCK)
    splits = max(1, min(groups // _LEAST_GROUPS, _PROGRAMS // num_tiles))
    return Fp8Tile(block_n=128, rows=rows, splits=cdiv(groups, cdiv(groups, splits)))  # none of which has no groups


BACKEND = TritonFp8()
