"""Experts as grouped products: tokens are put in order of their experts, in blocks that belong to one expert each.

A pair is a token with one of its experts; pair p is slot p % k of token p // k. All shapes follow from the number of
tokens, so that the kernels can run inside a graph: the order has room for the worst case, and programs beyond its
actual end return at once. Nothing depends on the order in which programs run.
"""

from functools import cached_property, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.core.fp8 import Fp8Format
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import early_launch
from hornbeam.ops.linear.contract import SCALE_BLOCK
from hornbeam.ops.linear.fp8_rounding import round_rows
from hornbeam.ops.moe.contract import Experts, ExpertsShape, ExpertWeights, GatedUnit
from hornbeam.ops.moe.tiles import TableKey, Tile, Tiles, TileTable, load_table
from hornbeam.ops.moe.triton_order import Order, order_by_expert
from hornbeam.ops.moe.triton_rows import run_few_tokens
from hornbeam.ops.moe.triton_unit import gated
from hornbeam.ops.query import OpQuery

_FEW_TOKENS = 1  # so many are taken pair by pair
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_size", "num_inputs"])
def _product_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    num_blocks,
    group_size,
    num_inputs,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[pair, :N] = x[pair // PAIRS_PER_ROW, :K] W^T + b of the pair's expert; GATED: W holds gate, then up.

    SCALED: both sides are eight-bit floats, whose scales change with each BLOCK_K features; BLOCK_N columns share them.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = 2 if GATED else 1
    NUM_COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first_block = program // (group_size * NUM_COLUMNS) * group_size
    group = tl.minimum(num_blocks - first_block, group_size)
    within = program % (group_size * NUM_COLUMNS)
    block, column = first_block + within % group, within // group
    if block * BLOCK_M >= tl.load(num_rows_ptr):
        return
    pairs = tl.load(order_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = pairs < num_pairs
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    in_columns = columns < N
    rows = x_ptr + (pairs // PAIRS_PER_ROW).to(tl.int64)[:, None] * K + features[None, :]
    weights = weight_ptr + expert * (PARTS * N * K) + columns[None, :] * K + features[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SCALED:
        NUM_GROUPS: tl.constexpr = (K + 127) // 128
        row_scales = x_scales_ptr + pairs // PAIRS_PER_ROW
        scales = scales_ptr + (expert * ((PARTS * N + 127) // 128) + column * BLOCK_N // 128) * NUM_GROUPS
        row_scale = tl.load(row_scales, mask=valid, other=0.0)
        scale = tl.load(scales)
        up_scale = tl.load(scales + N // 128 * NUM_GROUPS) if GATED else scale
    for begin in range(0, K, BLOCK_K):
        inside = begin + features < K
        x = tl.load(rows + begin, mask=valid[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & in_columns[None, :]
        tile = tl.load(weights + begin, mask=mask, other=0.0)
        if SCALED:
            total += tl.dot(x, tile) * (row_scale * scale)[:, None]
        else:
            total += tl.dot(x, tile, input_precision="ieee")
        if GATED:
            tile = tl.load(weights + N * K + begin, mask=mask, other=0.0)
            if SCALED:
                up_total += tl.dot(x, tile) * (row_scale * up_scale)[:, None]
            else:
                up_total += tl.dot(x, tile, input_precision="ieee")
        if SCALED:  # those of the next features arrive while these are multiplied
            following = tl.minimum(begin // BLOCK_K + 1, NUM_GROUPS - 1)
            row_scale = tl.load(row_scales + following * num_inputs, mask=valid, other=0.0)
            scale = tl.load(scales + following)
            if GATED:
                up_scale = tl.load(scales + N // 128 * NUM_GROUPS + following)
    if HAS_BIAS:
        biases = bias_ptr + expert * (PARTS * N) + columns
        total += tl.load(biases, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_total += tl.load(biases + N, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = gated(total, up_total, ALPHA, LIMIT, OFFSET, out_ptr.dtype.element_ty)
    places = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_columns[None, :])


@triton.jit
def _sum_kernel(
    parts_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The weighted sum of a token's pairs. Those without an expert were never written, so they are not read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        size = tl.where(tl.load(ids_ptr + pair) >= 0, SIZE, 0)
        part = tl.load(parts_ptr + pair * SIZE + columns, mask=columns < size, other=0.0)
        total += part.to(tl.float32) * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * SIZE + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


class TritonExperts:
    """See `Experts`."""

    def __init__(self, shape: ExpertsShape) -> None:
        self._shape = shape

    @cached_property
    def _table(self) -> TileTable:
        """Looked for when it is first needed."""
        shape = self._shape
        on_gpu = shape.device.type == "cuda"
        key = TableKey(
            num_experts=shape.num_experts,
            intermediate_size=shape.intermediate_size,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            device=torch.cuda.get_device_name(shape.device) if on_gpu else shape.device.type,
            dtype=str(shape.dtype if shape.fp8 is None else torch.float8_e4m3fn).removeprefix("torch."),
        )
        return load_table(key)

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
        """See `Experts`."""
        if 0 < len(x) <= _FEW_TOKENS and self._shape.fp8 is None:
            return run_few_tokens(x, weights, ids, experts, self._shape.unit)
        return self.run(x, weights, ids, experts, self._table.of(x.shape[0]))

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, tiles: Tiles) -> Tensor:
        """The same with tiles of the caller's choice."""
        shape = self._shape
        assert x.is_contiguous()
        assert ids.is_contiguous()
        out = torch.empty_like(x)
        if not len(x):
            return out
        order = order_by_expert(ids, shape.num_experts, tiles.block_m)
        inner = x.new_empty((ids.numel(), shape.intermediate_size))
        multiply = partial(multiply_pairs, order=order, fp8=shape.fp8)
        gate_up, down = (experts.gate_up, experts.gate_up_bias), (experts.down, experts.down_bias)
        multiply(x, *gate_up, inner, tile=tiles.gate_up, unit=shape.unit, scales=experts.gate_up_scales)
        parts = x.new_empty((ids.numel(), shape.hidden_size))
        multiply(inner, *down, parts, tile=tiles.down, scales=experts.down_scales)
        grid = (len(x), triton.cdiv(shape.hidden_size, _SUM_BLOCK))
        _sum_kernel[grid](
            parts,
            weights,
            ids,
            out,
            SIZE=shape.hidden_size,
            TOP_K=ids.shape[1],
            BLOCK=_SUM_BLOCK,
            **early_launch(x.device),
        )
        return out


def multiply_pairs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    order: Order,
    tile: Tile,
    unit: GatedUnit | None = None,
    *,
    scales: Tensor | None = None,
    fp8: Fp8Format | None = None,
) -> None:
    """One product of all pairs, [P, N]; with a unit, of gate and up, and the unit of both.

    x has a row per pair, or per token; it is rounded if the weight has scales.
    """
    x_scales: Tensor | None = None
    if scales is not None and fp8 is not None:
        x, x_scales = round_rows(x, power_of_two=fp8.power_of_two)
    assert weight.is_contiguous()
    num_columns, num_blocks = out.shape[1], len(order.experts)
    values = unit or GatedUnit()
    _product_kernel[(num_blocks * triton.cdiv(num_columns, tile.block_n),)](
        x,
        x_scales,
        weight,
        scales,
        bias,
        out,
        order.pairs,
        order.experts,
        order.num_rows,
        len(out),
        num_blocks,
        tile.group,
        len(x),
        N=num_columns,
        K=x.shape[1],
        PAIRS_PER_ROW=len(out) // len(x),
        GATED=unit is not None,
        HAS_BIAS=bias is not None,
        SCALED=scales is not None,
        ALPHA=values.alpha,
        LIMIT=values.limit,
        OFFSET=values.offset,
        BLOCK_M=order.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k if scales is None else SCALE_BLOCK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(x.device),
    )


class TritonBackend:
    """See `ExpertsBackend`."""

    captures = True

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def create(self, shape: ExpertsShape) -> Experts:
        """See `ExpertsBackend`."""
        return TritonExperts(shape)


BACKEND = TritonBackend()
