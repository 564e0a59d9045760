"""The second product of experts for many tokens on Hopper: one warp fetches, two groups of four multiply.

Each group has half of a block's rows and all columns of a tile, so that both multiply with the same weights; while one
stores, the other goes on, and the next tile is under way already. A half without any pair is left out. Whoever uses
this tries it first, see `ops/trial.py`.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hornbeam.ops.device import num_multiprocessors
from hornbeam.ops.gluon_stages import LAYOUT, make_barriers, multiply_stages
from hornbeam.ops.moe.triton_order import Order

BLOCK_M = 128  # rows of a block of the order
_HALF_M = 64
_BLOCK_N = 256
_BLOCK_K = 64
_STAGES = 4


@gluon.jit
def _fetch(
    x,
    weight,
    block_experts_ptr,
    num_rows_ptr,
    inputs,
    weights,
    full,
    empty,
    N,
    K,
    HALF_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Inputs and weights of tile after tile, as stages become empty."""
    num_columns = gl.cdiv(N, BLOCK_N)
    num_tiles = gl.load(num_rows_ptr) // (2 * HALF_M) * num_columns
    step = 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block, column = number // num_columns, number % num_columns
        row = gl.load(block_experts_ptr + block) * N + column * BLOCK_N
        for begin in range(0, K, BLOCK_K):
            stage = step % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            mbarrier.expect(arrived, (BLOCK_N + 2 * HALF_M) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(weight, [row, begin], arrived, weights.index(stage))
            for half in gl.static_range(2):
                first = (2 * block + half) * HALF_M
                tma.async_copy_global_to_shared(x, [first, begin], arrived, inputs.index(2 * stage + half))
            step += 1


@gluon.jit
def _multiply(
    out_ptr,
    order_ptr,
    num_rows_ptr,
    num_pairs,
    inputs,
    weights,
    full,
    empty,
    N,
    K,
    HALF: gl.constexpr,
    HALF_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One half of the rows of tile after tile."""
    HALF_N: gl.constexpr = BLOCK_N // 2
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    num_columns = gl.cdiv(N, BLOCK_N)
    num_tiles = gl.load(num_rows_ptr) // (2 * HALF_M) * num_columns
    step = 0
    for number in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        block, column = number // num_columns, number % num_columns
        first = (2 * block + HALF) * HALF_M
        if gl.load(order_ptr + first) < num_pairs:
            total, step = multiply_stages(inputs, weights, full, empty, step, K, HALF, 2, STAGES)
            pairs = gl.load(order_ptr + first + gl.arange(0, HALF_M, gl.SliceLayout(1, stored)))[:, None]
            columns = (column * BLOCK_N + gl.arange(0, HALF_N, gl.SliceLayout(0, stored)))[None, :]
            out = out_ptr + pairs.to(gl.int64) * N + columns
            left, right = total.to(dtype).reshape((HALF_M, 2, HALF_N)).permute((0, 2, 1)).split()
            valid = pairs < num_pairs
            gl.store(out, gl.convert_layout(left, stored), mask=valid & (columns < N))
            gl.store(out + HALF_N, gl.convert_layout(right, stored), mask=valid & (columns + HALF_N < N))
        else:
            for _ in range(0, K, BLOCK_K):
                mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1


@gluon.jit(do_not_specialize=["num_pairs"])
def _down_kernel(
    x,
    weight,
    out_ptr,
    order_ptr,
    block_experts_ptr,
    num_rows_ptr,
    num_pairs,
    N,
    K,
    HALF_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """x W^T of the pairs' experts: x [B * 2 HALF_M, K] in the order, weight [E * N, K], out [num_pairs, N]."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    inputs = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF_M, BLOCK_K], x.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    full, empty = make_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (out_ptr, order_ptr, num_rows_ptr, num_pairs, inputs, weights, full, empty, N, K,
                         0, HALF_M, BLOCK_N, BLOCK_K, STAGES)),
            (_multiply, (out_ptr, order_ptr, num_rows_ptr, num_pairs, inputs, weights, full, empty, N, K,
                         1, HALF_M, BLOCK_N, BLOCK_K, STAGES)),
            (_fetch, (x, weight, block_experts_ptr, num_rows_ptr, inputs, weights, full, empty, N, K,
                      HALF_M, BLOCK_N, BLOCK_K, STAGES)),
        ],
        [4, 1],  # warps of the second and of the third; the first has those of the kernel
        [232, 40],  # registers of their threads
    )  # fmt: skip


def multiply_down(x: Tensor, weights: Tensor, out: Tensor, order: Order) -> None:
    """x [B * BLOCK_M, K] in the order, weights [E, N, K] -> out [P, N] of pairs; float16 or bfloat16."""
    assert order.block_m == BLOCK_M
    num_out, num_in = weights.shape[1:]
    _down_kernel[(num_multiprocessors(out.device),)](
        TensorDescriptor.from_tensor(x, [_HALF_M, _BLOCK_K], LAYOUT),
        TensorDescriptor.from_tensor(weights.view(-1, num_in), [_BLOCK_N, _BLOCK_K], LAYOUT),
        out,
        order.pairs,
        order.experts,
        order.num_rows,
        order.num_pairs,
        num_out,
        num_in,
        HALF_M=_HALF_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        STAGES=_STAGES,
        num_warps=4,
    )
