"""silu(gate) * up of many rows on Hopper in one kernel: the product of both is never written.

Each program takes one tile after the other. One warp fetches the next features of 128 rows and of the weights of 128
gates and of their 128 ups, two groups of four warps multiply them with 64 rows each. While one applies the gate and
stores, the other goes on, and the next tile is under way already. Whoever uses this tries it first, see `ops/trial.py`.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hornbeam.ops.device import num_multiprocessors
from hornbeam.ops.gluon_stages import LAYOUT, make_barriers, multiply_stages
from hornbeam.ops.launch import cdiv

_HALF_M = 64
_SIZE = 128  # gates of a tile
_BLOCK_K = 64
_STAGES = 4
_GROUP = 16  # blocks of rows that take turns over all columns, so that both sides come from the cache mostly


@gluon.jit
def _place(number, num_blocks, num_columns, group):
    """Block of rows and column of a tile."""
    first = number // (group * num_columns) * group
    within = number - first * num_columns
    size = gl.minimum(num_blocks - first, group)
    return first + within % size, within // size


@gluon.jit
def _fetch(x, weight, inputs, weights, full, empty, num_blocks, num_columns, group, N, K):
    """Rows and weights of tile after tile, as stages become empty."""
    HALF_M: gl.constexpr = inputs.shape[1]
    SIZE: gl.constexpr = weights.shape[1] // 2
    BLOCK_K: gl.constexpr = weights.shape[2]
    STAGES: gl.constexpr = weights.shape[0]
    step = 0
    for number in range(gl.program_id(0), num_blocks * num_columns, gl.num_programs(0)):
        block, column = _place(number, num_blocks, num_columns, group)
        for begin in range(0, K, BLOCK_K):
            stage = step % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            mbarrier.expect(arrived, 2 * (HALF_M + SIZE) * BLOCK_K * 2)
            for half in gl.static_range(2):
                tile = weights.index(stage).slice(half * SIZE, SIZE)
                tma.async_copy_global_to_shared(weight, [half * N + column * SIZE, begin], arrived, tile)
                rows = [(2 * block + half) * HALF_M, begin]
                tma.async_copy_global_to_shared(x, rows, arrived, inputs.index(2 * stage + half))
            step += 1


@gluon.jit
def _silu_mul(gate, up):
    """gate / (1 + 2^(-gate log2(e))) * up, by approximations that are far better than half precision.

    In six instructions: Triton makes three times as many, and rounding on the way takes slow ones, one by one.
    """
    code: gl.constexpr = (
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
        " rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
    )
    return gl.inline_asm_elementwise(code, "=f,f,f", [gate, up], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _multiply(out, inputs, weights, outputs, full, empty, num_blocks, num_columns, group, K, HALF: gl.constexpr):
    """One half of the rows of tile after tile."""
    HALF_M: gl.constexpr = inputs.shape[1]
    SIZE: gl.constexpr = weights.shape[1] // 2
    stored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    dtype: gl.constexpr = out.dtype
    mine = outputs.index(HALF)
    step = 0
    for number in range(gl.program_id(0), num_blocks * num_columns, gl.num_programs(0)):
        block, column = _place(number, num_blocks, num_columns, group)
        total, step = multiply_stages(inputs, weights, full, empty, step, K, HALF, 2, weights.shape[0])
        gate, up = total.reshape((HALF_M, 2, SIZE)).permute((0, 2, 1)).split()
        result = _silu_mul(gate, up).to(dtype)
        tma.store_wait(0)  # of the tile before
        gl.thread_barrier()
        mine.store(gl.convert_layout(result, stored))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out, [(2 * block + HALF) * HALF_M, column * SIZE], mine)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "group"])
def _gate_kernel(
    x,
    weight,
    out,
    num_rows,
    group,
    N,
    K,
    HALF_M: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """x [T, K], weight [2 N, K], out [T, N]; what is beyond their edges is fetched as zeros, or not stored."""
    dtype: gl.constexpr = out.dtype
    inputs = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF_M, BLOCK_K], x.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 2 * SIZE, BLOCK_K], weight.layout)
    outputs = gl.allocate_shared_memory(dtype, [2, HALF_M, SIZE], out.layout)
    full, empty = make_barriers(STAGES, 2)
    num_blocks, num_columns = gl.cdiv(num_rows, 2 * HALF_M), gl.cdiv(N, SIZE)
    gl.warp_specialize(
        [
            (_multiply, (out, inputs, weights, outputs, full, empty, num_blocks, num_columns, group, K, 0)),
            (_multiply, (out, inputs, weights, outputs, full, empty, num_blocks, num_columns, group, K, 1)),
            (_fetch, (x, weight, inputs, weights, full, empty, num_blocks, num_columns, group, N, K)),
        ],
        [4, 1],  # warps of the second and of the third; the first has those of the kernel
        [232, 40],  # registers of their threads
    )


def multiply_gated(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [2 N, K] of gates and ups -> silu(gate) * up, [T, N]; float16 or bfloat16, T > 0."""
    (num_rows, num_in), num_out = x.shape, weight.shape[0] // 2
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    num_tiles = cdiv(num_rows, 2 * _HALF_M) * cdiv(num_out, _SIZE)
    _gate_kernel[(min(num_tiles, num_multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [_HALF_M, _BLOCK_K], LAYOUT),
        TensorDescriptor.from_tensor(weight, [_SIZE, _BLOCK_K], LAYOUT),
        TensorDescriptor.from_tensor(out, [_HALF_M, _SIZE], LAYOUT),
        num_rows,
        _GROUP,
        num_out,
        num_in,
        HALF_M=_HALF_M,
        SIZE=_SIZE,
        BLOCK_K=_BLOCK_K,
        STAGES=_STAGES,
        num_warps=4,
    )
    return out
