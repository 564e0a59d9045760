"""Experts as grouped products: tokens are put in order of their experts, in blocks that belong to one expert each.

A pair is a token with one of its experts; pair p is slot p % k of token p // k. All shapes follow from the number of
tokens, so that the kernels can run inside a graph: the order has room for the worst case, and programs beyond its
actual end return at once. Nothing depends on the order in which programs run.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hornbeam.core.fp8 import Fp8Format
from hornbeam.ops.device import needs_cuda, num_multiprocessors
from hornbeam.ops.launch import Kernel, cdiv, early_launch
from hornbeam.ops.linear.contract import SCALE_BLOCK
from hornbeam.ops.linear.fp8_rounding import round_rows
from hornbeam.ops.moe.contract import Experts, ExpertsShape, ExpertWeights, GatedUnit
from hornbeam.ops.moe.tiles import TableKey, Tile, Tiles, TileTable, load_table
from hornbeam.ops.moe.triton_order import VARIED_PAIRS, Order, order_by_expert
from hornbeam.ops.moe.triton_rows import run_few_tokens
from hornbeam.ops.moe.triton_unit import gated
from hornbeam.ops.query import OpQuery
from hornbeam.ops.trial import on_hopper, serves

_FEW_TOKENS = 4  # so many are taken pair by pair
_MANY_ROWS = 128  # blocks of so many have a kernel of their own
_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["num_pairs", "group_size", "scale_stride"])
def _product_kernel(
    x,
    x_scales_ptr,
    weight,
    scales_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    group_size,
    scale_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Tiles of x W^T + b of the pairs' experts, each program one after the other; `weight` describes [E * parts, N, K].

    GATED: gates and ups of tokens x [T, K], the unit of both is stored in the order. Else of x [B * BLOCK_M, K] in
    the order, stored as [num_pairs, N]. SCALED: both sides are eight-bit floats, whose scales change with each BLOCK_K
    features; BLOCK_N columns share them. Those of all rows of x stand side by side, `scale_stride` from group to group.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    NUM_COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    NUM_SCALES: tl.constexpr = (K + 127) // 128
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_blocks = tl.load(num_rows_ptr) // BLOCK_M
    for number in tl.range(tl.program_id(0), num_blocks * NUM_COLUMNS, tl.num_programs(0), flatten=FLATTEN):
        first_block = number // (group_size * NUM_COLUMNS) * group_size
        group = tl.minimum(num_blocks - first_block, group_size)
        within = number % (group_size * NUM_COLUMNS)
        block, column = first_block + within % group, within // group
        places = block * BLOCK_M + tl.arange(0, BLOCK_M)
        pairs = tl.load(order_ptr + places)
        valid = pairs < num_pairs
        expert = tl.load(block_experts_ptr + block)
        features = tl.arange(0, BLOCK_K)
        inputs = pairs // TOP_K if GATED else places
        if GATED:
            rows = x + inputs.to(tl.int64)[:, None] * K + features[None, :]
        if SCALED:  # loaded ahead: those of the next features arrive while these are multiplied
            row_scales = x_scales_ptr + inputs
            halves = tl.arange(0, PARTS * BLOCK_N) // BLOCK_N * (N // 128)
            first_scales = expert * ((PARTS * N + 127) // 128) + column * BLOCK_N // 128
            column_scales = scales_ptr + (first_scales + halves).to(tl.int64) * NUM_SCALES
            row_scale, column_scale = tl.load(row_scales, mask=valid, other=0.0), tl.load(column_scales)
        total = tl.zeros((BLOCK_M, PARTS * BLOCK_N), tl.float32)
        for begin in range(0, K, BLOCK_K):
            if GATED:
                mask = valid[:, None]
                if K % BLOCK_K:
                    mask = mask & (begin + features < K)[None, :]
                part = tl.load(rows + begin, mask=mask, other=0.0)
            else:
                part = x.load([block * BLOCK_M, begin])
            tile = weight.load([expert * PARTS, column * BLOCK_N, begin]).reshape(PARTS * BLOCK_N, BLOCK_K)
            if SCALED:
                total += tl.dot(part, tile.T) * row_scale[:, None] * column_scale[None, :]
                following = tl.minimum(begin // BLOCK_K + 1, NUM_SCALES - 1)
                row_scale = tl.load(row_scales + following * scale_stride, mask=valid, other=0.0)
                column_scale = tl.load(column_scales + following)
            else:
                total = tl.dot(part, tile.T, total, input_precision="ieee")
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < N
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        if HAS_BIAS:
            biases = bias_ptr + expert * (PARTS * N) + columns
        if GATED:
            gate, up = tl.split(total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))
            if HAS_BIAS:
                gate += tl.load(biases, mask=inside, other=0.0).to(tl.float32)[None, :]
                up += tl.load(biases + N, mask=inside, other=0.0).to(tl.float32)[None, :]
            out, targets, stored = gated(gate, up, ALPHA, LIMIT, OFFSET, dtype), places, places >= 0
        else:
            if HAS_BIAS:
                total += tl.load(biases, mask=inside, other=0.0).to(tl.float32)[None, :]
            out, targets, stored = total, pairs, valid
        out_rows = out_ptr + targets.to(tl.int64)[:, None] * N
        tl.store(out_rows + columns[None, :], out.to(dtype), mask=stored[:, None] & inside[None, :])


@Kernel
@triton.jit(do_not_specialize=["has_base"])
def _sum_kernel(
    parts_ptr,
    weights_ptr,
    ids_ptr,
    base_ptr,
    out_ptr,
    has_base,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A token's base, and the weighted sum of its pairs. Those without an expert were never written, so not read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    total = tl.load(base_ptr + token * SIZE + columns, mask=columns < SIZE * has_base, other=0.0).to(tl.float32)
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
        self._down_of_many = None if shape.fp8 else _down_of_many(shape.dtype, shape.device)

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
            dtype=str(shape.weight_dtype).removeprefix("torch."),
        )
        return load_table(key)

    def __call__(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, base: Tensor | None = None
    ) -> Tensor:
        """See `Experts`."""
        if 0 < len(x) <= _FEW_TOKENS and self._shape.fp8 is None:
            return run_few_tokens(x, weights, ids, experts, self._shape.unit, base)
        if self._table.untried and x.is_cuda:
            self._compile(x, weights, ids, experts)
        return self.run(x, weights, ids, experts, self._table.of(x.shape[0]), base)

    def _compile(self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> None:
        """Have all tiles of the table compiled, side by side: a compiler at work would hold up a later step."""
        untried, self._table.untried = self._table.untried, []
        stream = torch.cuda.current_stream(x.device)  # where x is made; threads have streams of their own

        num_experts, top_k = self._shape.num_experts, ids.shape[1]
        jobs: list[Callable[[], object]] = [
            partial(self.run, x[:1], weights[:1], ids[:1], experts, tiles) for tiles in untried
        ]
        for num_pairs in VARIED_PAIRS:
            several = ids.new_zeros(num_pairs // top_k, top_k)
            jobs += [partial(order_by_expert, several, num_experts, size) for size in {t.block_m for t in untried}]

        def run(job: Callable[[], object]) -> None:
            with torch.cuda.stream(stream):
                job()

        with ThreadPoolExecutor(initializer=torch.cuda.synchronize) as pool:  # makes a context current
            list(pool.map(run, jobs))

    def run(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        experts: ExpertWeights,
        tiles: Tiles,
        base: Tensor | None = None,
    ) -> Tensor:
        """The same with tiles of the caller's choice."""
        shape = self._shape
        assert x.is_contiguous()
        assert ids.is_contiguous()
        out = torch.empty_like(x)
        if not len(x):
            return out
        order = order_by_expert(ids, shape.num_experts, tiles.block_m)
        inner = x.new_empty((len(order.pairs), shape.intermediate_size))
        gate_up = StackedWeights(experts.gate_up, experts.gate_up_bias, experts.gate_up_scales, shape.fp8)
        multiply_pairs(x, gate_up, inner, order, tiles.gate_up, shape.unit)
        parts = x.new_empty((ids.numel(), shape.hidden_size))
        if order.block_m == _MANY_ROWS and self._down_of_many is not None and experts.down_bias is None:
            self._down_of_many(inner, experts.down, parts, order)
        else:
            down = StackedWeights(experts.down, experts.down_bias, experts.down_scales, shape.fp8)
            multiply_pairs(inner, down, parts, order, tiles.down)
        grid = (len(x), cdiv(shape.hidden_size, _SUM_BLOCK))
        _sum_kernel[grid](
            parts,
            weights,
            ids,
            parts if base is None else base,
            out,
            int(base is not None),
            SIZE=shape.hidden_size,
            TOP_K=ids.shape[1],
            BLOCK=_SUM_BLOCK,
            **early_launch(x.device),
        )
        return out


@dataclass(frozen=True, slots=True)
class StackedWeights:
    """Of one product of all experts; scales and what they mean: see `ExpertWeights`."""

    values: Tensor  # [E, N, K], or with a unit [E, 2 N, K]
    bias: Tensor | None = None
    scales: Tensor | None = None
    fp8: Fp8Format | None = None


def multiply_pairs(
    x: Tensor, weights: StackedWeights, out: Tensor, order: Order, tile: Tile, unit: GatedUnit | None = None
) -> None:
    """One product of all pairs; x is rounded if the weights have scales.

    With a unit, of gate and up, and the unit of both: x [T, K] of tokens -> out [B * block_m, N] in the order. Else
    x [B * block_m, K] in the order -> out [P, N] of pairs.
    """
    x_scales, scale_stride, block_k = None, 0, tile.block_k
    if weights.fp8 is not None and weights.scales is not None:
        (x, x_scales), block_k = round_rows(x, power_of_two=weights.fp8.power_of_two), SCALE_BLOCK
        scale_stride = x_scales.stride(1)
    parts, values = 1 if unit is None else 2, unit or GatedUnit()
    num_experts, num_rows, num_features = weights.values.shape
    stacked = weights.values.view(num_experts * parts, num_rows // parts, num_features)
    num_tiles = len(order.experts) * cdiv(stacked.shape[1], tile.block_n)
    num_programs = min(num_tiles, tile.programs * num_multiprocessors(out.device)) if tile.programs else num_tiles
    _product_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x, [order.block_m, block_k]) if unit is None else x,
        x_scales,
        TensorDescriptor.from_tensor(stacked, [parts, tile.block_n, block_k]),
        weights.scales,
        weights.bias,
        out,
        order.pairs,
        order.experts,
        order.num_rows,
        order.num_pairs,
        tile.group,
        scale_stride,
        N=stacked.shape[1],
        K=num_features,
        TOP_K=order.top_k,
        GATED=unit is not None,
        HAS_BIAS=weights.bias is not None,
        SCALED=x_scales is not None,
        ALPHA=values.alpha,
        LIMIT=values.limit,
        OFFSET=values.offset,
        BLOCK_M=order.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        FLATTEN=tile.flatten,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **early_launch(out.device),
    )


@cache
def _down_of_many(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Order], None] | None:
    """`multiply_down` where it serves."""
    if not on_hopper(dtype, device):
        return None

    def trial() -> tuple[Tensor, Tensor]:
        from hornbeam.ops.moe.gluon_down import multiply_down

        block, size = _MANY_ROWS, 128
        x, weights = torch.rand(2 * block, size, device=device), torch.rand(2, block, size, device=device)
        x, weights = x.to(dtype), weights.to(dtype)
        out = x.new_zeros(block + 1, block)
        places = torch.arange(2 * block, dtype=torch.int32, device=device)
        pairs, experts, rows = places.clamp(max=block + 1), places[:2].clone(), places[-1:] + 1
        order = Order(pairs=pairs, experts=experts, num_rows=rows, block_m=block, num_pairs=block + 1, top_k=1)
        multiply_down(x, weights, out, order)
        return out, torch.cat((x[:block] @ weights[0].T, x[block : block + 1] @ weights[1].T))

    if not serves("experts of many tokens", "Triton's serves", trial):
        return None
    from hornbeam.ops.moe.gluon_down import multiply_down

    return multiply_down


class TritonBackend:
    """See `ExpertsBackend`."""

    captures = True

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices, and rows of weights that the tensor memory engine can address."""
        reason = needs_cuda(query)
        inner = 0 if query.mixture is None else query.mixture.intermediate_size
        if reason is None and (query.hidden_size % 16 or inner % 16):
            reason = "sizes must be multiples of 16"
        return reason

    def create(self, shape: ExpertsShape) -> Experts:
        """See `ExpertsBackend`."""
        return TritonExperts(shape)


BACKEND = TritonBackend()
