"""What products in Gluon share on Hopper: stages of inputs and weights, which one warp fetches and others multiply.

Written in Gluon, a part of Triton that may change: whoever imports this tries it first; see `ops/trial.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # of a stage


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """For each stage one barrier that tells its readers that it has arrived, and one by which all are done with it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def multiply_stages(
    inputs, weights, full, empty, step, K, READER: gl.constexpr, READERS: gl.constexpr, STAGES: gl.constexpr
):
    """One reader's x W^T over K features, [M, N] float32, and how many stages all have come to.

    inputs: [READERS * STAGES, M, features of a stage], weights: [STAGES, N, the same]; step: stages before these.
    """
    ROWS: gl.constexpr = inputs.shape[1]
    OUTPUTS: gl.constexpr = weights.shape[1]
    FEATURES: gl.constexpr = weights.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUTPUTS, 16])
    total = gl.zeros((ROWS, OUTPUTS), gl.float32, layout)
    for begin in range(0, K, FEATURES):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        weight = weights.index(stage).permute((1, 0))
        total = warpgroup_mma(inputs.index(READERS * stage + READER), weight, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=(total,))  # the one before is done
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=begin > 0)
        step += 1
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return total, step
