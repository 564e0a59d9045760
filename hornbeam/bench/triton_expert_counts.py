"""The counting of `expert_counts` as one kernel of one program, which graphs can record."""

import math

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2

_CHUNK = 2048  # pairs at a time
_FEW = 64  # where there are no more: decode of few rows, whose steps are short


@Kernel
@triton.jit
def _count_kernel(
    ids_ptr,
    totals_ptr,
    num_pairs,
    log_missing,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """log_missing: log2 of the chance that a token does not take a given expert. A token has k experts, or none."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_pairs, CHUNK):
        pairs = first + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
        counts += tl.histogram(tl.where(ids < 0, EXPERTS, ids), BINS)
    counts = tl.where(bins < EXPERTS, counts, 0)
    distinct = tl.sum((counts > 0).to(tl.int32), 0)
    num_tokens = tl.sum(counts, 0) // TOP_K
    if num_tokens > 0:
        expected = EXPERTS * (1.0 - tl.exp2(num_tokens * log_missing))
        tl.store(totals_ptr, tl.load(totals_ptr) + distinct)
        tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + expected)
        tl.store(totals_ptr + 2, tl.load(totals_ptr + 2) + 1.0)


def count_experts_kernel(ids: Tensor, num_experts: int, missing: float, totals: Tensor) -> None:
    """See `expert_counts.count_experts`."""
    few = ids.numel() <= _FEW
    _count_kernel[(1,)](
        ids,
        totals,
        ids.numel(),
        math.log2(missing) if missing else -1000.0,
        EXPERTS=num_experts,
        BINS=next_power_of_2(num_experts + 1),
        TOP_K=ids.shape[1],
        CHUNK=_FEW if few else _CHUNK,
        num_warps=1 if few else 8,
        **early_launch(ids.device),
    )
