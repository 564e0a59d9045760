"""Products with few rows, which only read the weights once: as near to memory bandwidth as it gets.

For a single row the vendor's library takes matrix units, too, and splits some shapes with a second kernel; here each
program sums a few outputs on plain lanes, can normalise its input and gate its output on the way, and its first weights
arrive while the kernel ahead still runs. From 2 to 16 rows matrix units pay, but small matrices are over before the
library's kernels have begun. The rest goes to the library.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.linear.algorithms import LibraryProducts
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.linear.triton_split import split_product, splits
from hornbeam.ops.query import OpQuery

logger = logging.getLogger(__name__)

_MAX_ROWS = 16  # what a matrix unit takes at once
_LARGEST_FOR_ROWS = 16 * 2**20  # weights; beyond, the library is as fast for several rows


@triton.jit
def _load_weights(pointers, valid, inside, EVEN: tl.constexpr):
    """A tile of weights. Masks cost bandwidth, so there are none where the tiles divide the matrix."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def _accumulate(
    total,
    up_total,
    squares,
    tile,
    up_tile,
    x_ptr,
    residual_ptr,
    sum_ptr,
    norm_weight_ptr,
    features,
    inside,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
):
    """Add one tile's products with x + residual, which is rounded where the reference rounds.

    The first program keeps the sum for others.
    """
    x = tl.load(x_ptr + features, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + features, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        if tl.program_id(0) == 0:
            tl.store(sum_ptr + features, x, mask=inside)
    x = x.to(tl.float32)
    if NORM:
        squares += x * x
        x *= tl.load(norm_weight_ptr + features, mask=inside, other=0.0).to(tl.float32)
    total += tile.to(tl.float32) * x[None, :]
    if GATED:
        up_total += up_tile.to(tl.float32) * x[None, :]
    return total, up_total, squares


@Kernel
@triton.jit
def _row_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    eps,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N of N outputs. The first tile of weights does not wait for x.

    The norm divides by one number, so it is applied to the outputs: the sum of squares grows along with the products.
    """
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % BLOCK_K == 0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    features = tl.arange(0, BLOCK_K)
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    up_weights = weights + N * K if GATED else weights
    tile = _load_weights(weights, valid, features < K, EVEN)
    up_tile = _load_weights(up_weights, valid, features < K, EVEN) if GATED else tile
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up_total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    total, up_total, squares = _accumulate(
        total, up_total, squares, tile, up_tile,
        x_ptr, residual_ptr, sum_ptr, norm_weight_ptr, features, features < K, ADD, NORM, GATED,
    )  # fmt: skip
    for begin in range(BLOCK_K, K, BLOCK_K):
        inside = begin + features < K
        tile = _load_weights(weights + begin, valid, inside, EVEN)
        up_tile = _load_weights(up_weights + begin, valid, inside, EVEN) if GATED else tile
        total, up_total, squares = _accumulate(
            total, up_total, squares, tile, up_tile,
            x_ptr, residual_ptr, sum_ptr, norm_weight_ptr, begin + features, inside, ADD, NORM, GATED,
        )  # fmt: skip
    out, up = tl.sum(total, 1), tl.sum(up_total, 1)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        out *= factor
        up *= factor
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + N + columns, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * up
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _load_rows(pointers, present, inside, EVEN: tl.constexpr):
    """Some features of all rows, [features, rows]."""
    if EVEN:
        return tl.load(pointers, mask=present[None, :], other=0.0)
    return tl.load(pointers, mask=present[None, :] & inside[:, None], other=0.0)


@Kernel
@triton.jit(do_not_specialize=("num_rows",))
def _rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N outputs of all rows, as W x^T. The first tile of weights does not wait for x."""
    EVEN: tl.constexpr = N % BLOCK_N == 0 and K % BLOCK_K == 0
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    features = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, ROWS)
    present = rows < num_rows
    weights = weight_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    inputs = x_ptr + rows[None, :] * x_stride + features[:, None]
    tile = _load_weights(weights, valid, features < K, EVEN)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = _load_rows(inputs, present, features < K, EVEN)
    total = tl.dot(tile, x)
    for begin in range(BLOCK_K, K, BLOCK_K):
        inside = begin + features < K
        tile = _load_weights(weights + begin, valid, inside, EVEN)
        x = _load_rows(inputs + begin, present, inside, EVEN)
        total = tl.dot(tile, x, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + rows[None, :] * N + columns[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=present[None, :] & valid[:, None])


class TritonLinear:
    """See `LinearProduct`."""

    fused_rows = 1

    def __init__(self) -> None:
        self._library: LibraryProducts | None = None  # until `prepare`

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def prepare(self, weights: Sequence[Tensor], num_rows: Sequence[int]) -> None:
        """See `LinearProduct`. Times the library's algorithms in half precision."""
        if weights[0].dtype.itemsize != 2:
            return
        try:
            self._library = self._library or LibraryProducts(weights[0].device)
        except OSError as error:
            logger.warning("cuBLASLt cannot be opened (%s): products take cuBLAS's own choice of algorithms", error)
            return
        alike: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            alike.setdefault(weight.shape, []).append(weight)
        self._library.prepare([(n, group) for group in alike.values() for n in num_rows if not _is_own(n, group[0])])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearProduct`."""
        if x.shape[0] == 1:
            return _single_row(x, None, None, weight, bias, gated=False)[0]
        if _is_own(x.shape[0], weight):
            return _few_rows(x, weight, bias)
        if self._library is None or bias is not None:
            return F.linear(x, weight, bias)
        return self._library.linear(x, weight)

    def wide(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `LinearProduct`."""
        if x.shape[0] == 1:
            return _single_row(x, None, None, weight, None, gated=False, dtype=torch.float32)[0]
        if x.dtype == weight.dtype and splits(*x.shape):
            return split_product(x, weight)
        if x.is_cuda and x.dtype == weight.dtype:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return F.linear(x.float(), weight.float())

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LinearProduct`. What is done here leaves the residual to the norm behind, which has it at hand."""
        if bias is not None or self._library is None or _is_own(x.shape[0], weight):
            return self.linear(x, weight, bias), residual
        return self._library.added(x, weight, residual)

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm | None,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `LinearProduct`."""
        return _single_row(x, residual, norm, weight, bias, gated=gated)


def _is_own(num_rows: int, weight: Tensor) -> bool:
    """Whether a product is done here, rather than by the library."""
    few = num_rows <= _MAX_ROWS and weight.dtype.itemsize == 2 and weight.numel() <= _LARGEST_FOR_ROWS
    return num_rows == 1 or (num_rows > 0 and few)


def _single_row(
    x: Tensor,
    residual: Tensor | None,
    norm: InputNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `LinearProduct.normed`; `dtype` is that of the outputs, by itself that of `x`."""
    num_out, num_in = weight.shape
    assert weight.is_contiguous()
    assert x.shape[0] == x.stride(1) == 1
    if gated:
        num_out //= 2
    out = torch.empty((1, num_out), dtype=dtype or x.dtype, device=x.device)
    total = x if residual is None else torch.empty((1, num_in), dtype=x.dtype, device=x.device)
    tile = _single_row_tile(num_in, num_out) if norm is None else _normed_tile(num_in, gated)
    block_n, block_k, num_warps = tile
    _row_kernel[(cdiv(num_out, block_n),)](
        x,
        x if residual is None else residual,
        weight if norm is None else norm.weight,
        weight,
        weight if bias is None else bias,
        out,
        total,
        0.0 if norm is None else norm.eps,
        K=num_in,
        N=num_out,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        HAS_BIAS=bias is not None,
        ADD=residual is not None,
        NORM=norm is not None,
        GATED=gated,
        num_warps=num_warps,
        **early_launch(x.device),
    )
    return out, total


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    assert weight.is_contiguous()
    assert x.stride(1) == 1
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    block_n, block_k, num_warps = _few_rows_tile(num_in, num_out)
    _rows_kernel[(cdiv(num_out, block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        num_rows,
        x.stride(0),
        K=num_in,
        N=num_out,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ROWS=_MAX_ROWS,
        HAS_BIAS=bias is not None,
        num_warps=num_warps,
        num_stages=6,
        **early_launch(x.device),
    )
    return out


# Outputs and inputs per program and its warps: the best of searches on an H200 over the shapes of 0.6B and 8B models.


def _single_row_tile(num_in: int, num_out: int) -> tuple[int, int, int]:
    if num_in > 8192 or num_out <= 256:
        return 1, _stretch(num_in, 2048), 8
    if num_in >= 4096:
        whole = _stretch(num_in, 4096) == num_in
        return (2, num_in, 8) if whole and num_out <= num_in else (4, _stretch(num_in, 2048), 8)
    if num_out > 16 * num_in:  # a head
        return 4, _stretch(num_in, 512), 2
    return 2, _stretch(num_in, 1024), 4


def _normed_tile(num_in: int, gated: bool) -> tuple[int, int, int]:
    """Here x takes work, too, so that fewer, longer stretches of it pay."""
    if num_in >= 4096:
        return 2 if gated else 4, _stretch(num_in, 4096), 8
    if num_in == 2048 and not gated:
        return 2, 2048, 8
    return 4, _stretch(num_in, 1024), 4


def _stretch(num_in: int, most: int) -> int:
    """The largest power of two up to `most` that divides the inputs, unless that is small: masks cost less then."""
    divisor = num_in & -num_in
    return min(most, divisor if divisor >= 256 else next_power_of_2(num_in))


def _few_rows_tile(num_in: int, num_out: int) -> tuple[int, int, int]:
    if num_in >= 4096 and num_out >= 4096:
        return 32, 256, 4
    return 16, 128, 2


BACKEND = TritonLinear()
