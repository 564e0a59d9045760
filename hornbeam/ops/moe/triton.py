"""Experts as grouped products: tokens are put in order of their experts, in blocks that belong to one expert each.

A pair is a token with one of its experts; pair p is slot p % k of token p // k. All shapes follow from the number of
tokens, so that the kernels can run inside a graph: the order has room for the worst case, and programs beyond its
actual end return at once. Nothing depends on the order in which programs run.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.moe.contract import Experts, ExpertsShape, ExpertWeights, GatedUnit
from hornbeam.ops.moe.tiles import TableKey, Tile, Tiles, load_table
from hornbeam.ops.query import OpQuery

_CHUNK = 2048  # pairs that an ordering program looks at together
_SUM_BLOCK = 1024


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, num_pairs, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """Adds the pairs of a chunk to the counts of their experts."""
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    counts = tl.histogram(tl.where(ids < 0, EXPERTS, ids), BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + bins, counts, mask=bins < EXPERTS)


@triton.jit
def _order_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """One expert: its pairs in ascending order, then padding (num_pairs) up to a multiple of BLOCK_M."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    places = tl.arange(0, CHUNK)
    if COUNTED:
        counts = tl.load(counts_ptr + bins, mask=bins < EXPERTS, other=0)
    else:
        ids = tl.load(ids_ptr + places, mask=places < num_pairs, other=-1)
        counts = tl.histogram(tl.where(ids < 0, EXPERTS, ids), BINS)
    counts = tl.where(bins < EXPERTS, counts, 0)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin = tl.sum(tl.where(bins < expert, padded, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    end = begin + tl.sum(tl.where(bins == expert, padded, 0), 0)
    if expert == EXPERTS - 1:
        tl.store(num_rows_ptr, end)
    if count > 0:
        position = begin
        for first in range(0, num_pairs, CHUNK):
            pairs = first + places
            own = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert
            rank = tl.cumsum(own.to(tl.int32), 0)
            tl.store(order_ptr + position + rank - 1, pairs, mask=own)
            position += tl.sum(own.to(tl.int32), 0)
        fill = position + tl.arange(0, BLOCK_M)
        tl.store(order_ptr + fill, tl.zeros((BLOCK_M,), tl.int32) + num_pairs, mask=fill < end)
        for block in range(begin // BLOCK_M, end // BLOCK_M):
            tl.store(block_experts_ptr + block, expert)


@triton.jit
def _gated(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """See `GatedUnit`; float32."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return (up + OFFSET) * gate / (1.0 + tl.exp(-ALPHA * gate))


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    num_blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[pair, :N] = x[pair // PAIRS_PER_ROW, :K] W^T + b of the pair's expert; GATED: W holds gate, then up."""
    PARTS: tl.constexpr = 2 if GATED else 1
    NUM_COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first_block = program // (GROUP * NUM_COLUMNS) * GROUP
    group = tl.minimum(num_blocks - first_block, GROUP)
    within = program % (GROUP * NUM_COLUMNS)
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
    for begin in range(0, K, BLOCK_K):
        inside = begin + features < K
        x = tl.load(rows + begin, mask=valid[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & in_columns[None, :]
        tile = tl.load(weights + begin, mask=mask, other=0.0)
        total += tl.dot(x, tile, input_precision="ieee")
        if GATED:
            tile = tl.load(weights + N * K + begin, mask=mask, other=0.0)
            up_total += tl.dot(x, tile, input_precision="ieee")
    if HAS_BIAS:
        biases = bias_ptr + expert * (PARTS * N) + columns
        total += tl.load(biases, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_total += tl.load(biases + N, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        dtype = out_ptr.dtype.element_ty  # rounds where the reference does
        total = _gated(total.to(dtype).to(tl.float32), up_total.to(dtype).to(tl.float32), ALPHA, LIMIT, OFFSET)
    places = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_columns[None, :])


@triton.jit
def _sum_kernel(parts_ptr, weights_ptr, ids_ptr, out_ptr, SIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """The weighted sum of a token's pairs. Those without an expert were never written, so they are not read."""
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
        on_gpu = shape.device.type == "cuda"
        key = TableKey(
            num_experts=shape.num_experts,
            intermediate_size=shape.intermediate_size,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            device=torch.cuda.get_device_name(shape.device) if on_gpu else shape.device.type,
            dtype=str(shape.dtype).removeprefix("torch."),
        )
        self._table = load_table(key)

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
        """See `Experts`."""
        return self.run(x, weights, ids, experts, self._table.of(x.shape[0]))

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, tiles: Tiles) -> Tensor:
        """The same with tiles of the caller's choice."""
        shape = self._shape
        assert x.is_contiguous()
        assert ids.is_contiguous()
        out = torch.empty_like(x)
        if not len(x):
            return out
        order, block_experts, num_rows = order_by_expert(ids, shape.num_experts, tiles.block_m)
        product = partial(_product, order=order, block_experts=block_experts, num_rows=num_rows, ids=ids, tiles=tiles)
        inner = x.new_empty((ids.numel(), shape.intermediate_size))
        product(x, experts.gate_up, experts.gate_up_bias, inner, tile=tiles.gate_up, unit=shape.unit)
        parts = x.new_empty((ids.numel(), shape.hidden_size))
        product(inner, experts.down, experts.down_bias, parts, tile=tiles.down, unit=None)
        grid = (len(x), triton.cdiv(shape.hidden_size, _SUM_BLOCK))
        _sum_kernel[grid](parts, weights, ids, out, SIZE=shape.hidden_size, TOP_K=ids.shape[1], BLOCK=_SUM_BLOCK)
        return out


def order_by_expert(ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in blocks of `block_m`, expert by expert: ids [T, k] -> order [B * block_m], expert of each block [B], [1].

    A block's free places hold the number of all pairs; ids of -1 are left out. Of the B blocks, so many that there
    are always enough, the first ones are in use: the last tensor counts their places. All int32.
    """
    num_pairs = ids.numel()
    num_blocks = min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))
    order, block_experts = ids.new_empty(num_blocks * block_m), ids.new_empty(num_blocks)
    num_rows, counts = ids.new_empty(1), ids
    bins = triton.next_power_of_2(num_experts + 1)
    counted = num_pairs > _CHUNK
    if counted:
        counts = ids.new_zeros(num_experts)
        grid = (triton.cdiv(num_pairs, _CHUNK),)
        _count_kernel[grid](ids, counts, num_pairs, EXPERTS=num_experts, BINS=bins, CHUNK=_CHUNK)
    _order_kernel[(num_experts,)](
        ids,
        counts,
        order,
        block_experts,
        num_rows,
        num_pairs,
        EXPERTS=num_experts,
        BINS=bins,
        CHUNK=_CHUNK if counted else max(16, triton.next_power_of_2(num_pairs)),
        BLOCK_M=block_m,
        COUNTED=counted,
    )
    return order, block_experts, num_rows


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    order: Tensor,
    block_experts: Tensor,
    num_rows: Tensor,
    ids: Tensor,
    tiles: Tiles,
    tile: Tile,
    unit: GatedUnit | None,
) -> None:
    """One product of all pairs; with a unit, of gate and up, and the unit of both."""
    assert weight.is_contiguous()
    num_columns, num_blocks = out.shape[1], len(block_experts)
    values = unit or GatedUnit()
    _product_kernel[(num_blocks * triton.cdiv(num_columns, tile.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        order,
        block_experts,
        num_rows,
        ids.numel(),
        num_blocks,
        N=num_columns,
        K=x.shape[1],
        PAIRS_PER_ROW=ids.numel() // len(x),
        GATED=unit is not None,
        HAS_BIAS=bias is not None,
        ALPHA=values.alpha,
        LIMIT=values.limit,
        OFFSET=values.offset,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
