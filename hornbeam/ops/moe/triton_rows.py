"""Experts of very few tokens: each pair of a token and an expert by itself, which needs no order and no matrix units.

Two kernels, each as fast as the weights can be read: all gates and ups, with the unit at the end, then for each output
of a token the weighted sum over its experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.moe.contract import ExpertWeights, GatedUnit
from hornbeam.ops.moe.triton_unit import gated


@triton.jit
def _load_weights(pointers, valid, features, K: tl.constexpr, EVEN: tl.constexpr, ONCE: tl.constexpr):
    """A tile of weights. Masks cost bandwidth, so there is but one bit per output where tiles divide the matrix.

    ONCE: nobody else reads it, so it need not displace what is in the device's cache.
    """
    mask = valid[:, None]
    if not EVEN:
        mask = mask & (features < K)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first" if ONCE else "").to(tl.float32)


@Kernel
@triton.jit
def _gate_up_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N of N inner features of one pair: unit(x W^T + b) of the pair's expert, whose W holds gate, then up."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < tl.where(expert >= 0, N, 0)
    features = tl.arange(0, BLOCK_K)
    weights = weight_ptr + (expert * (2 * N) + columns[:, None]) * K + features[None, :]
    gate_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        inputs = begin + features
        x = tl.load(x_ptr + (pair // TOP_K) * K + inputs, mask=inputs < K, other=0.0).to(tl.float32)[None, :]
        gate_total += _load_weights(weights + begin, valid, inputs, K, EVEN, ONCE) * x
        up_total += _load_weights(weights + N * K + begin, valid, inputs, K, EVEN, ONCE) * x
    gate, up = tl.sum(gate_total, 1), tl.sum(up_total, 1)
    if HAS_BIAS:
        biases = bias_ptr + expert * (2 * N) + columns
        gate += tl.load(biases, mask=valid, other=0.0).to(tl.float32)
        up += tl.load(biases + N, mask=valid, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = gated(gate, up, ALPHA, LIMIT, OFFSET, dtype)
    tl.store(out_ptr + pair.to(tl.int64) * N + columns, out.to(dtype), mask=valid)


@Kernel
@triton.jit(do_not_specialize=["has_base"])
def _down_kernel(
    inner_ptr,
    shares_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    base_ptr,
    out_ptr,
    has_base,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_N of N outputs of one token: base, and the sum over its slots of share * (inner W^T + b)."""
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    biases = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        valid = columns < tl.where(expert >= 0, N, 0)
        num_inputs = tl.where(expert >= 0, K, 0)
        share = tl.load(shares_ptr + pair)
        weights = weight_ptr + (expert * N + columns[:, None]) * K + features[None, :]
        for begin in tl.static_range(0, K, BLOCK_K):
            inputs = begin + features
            inner = tl.load(inner_ptr + pair * K + inputs, mask=inputs < num_inputs, other=0.0).to(tl.float32)
            tile = _load_weights(weights + begin, valid, inputs, K, EVEN, ONCE)
            total += tile * (inner * share)[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * N + columns, mask=valid, other=0.0)
            biases += bias.to(tl.float32) * share
    base = tl.load(base_ptr + token.to(tl.int64) * N + columns, mask=columns < N * has_base, other=0.0)
    out = tl.sum(total, 1) + biases + base.to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + columns, out.to(out_ptr.dtype.element_ty), mask=columns < N)


def run_few_tokens(
    x: Tensor, shares: Tensor, ids: Tensor, experts: ExpertWeights, unit: GatedUnit, base: Tensor | None = None
) -> Tensor:
    """See `Experts`."""
    num_tokens, hidden = x.shape
    num_inner, top_k = experts.down.shape[2], ids.shape[1]
    assert experts.gate_up.is_contiguous()
    assert experts.down.is_contiguous()
    early = early_launch(x.device)
    inner, out = x.new_empty(ids.numel(), num_inner), torch.empty_like(x)
    block_n, block_k, num_warps = _gate_up_tile(hidden)
    _gate_up_kernel[(ids.numel(), cdiv(num_inner, block_n))](
        x,
        ids,
        experts.gate_up,
        experts.gate_up if experts.gate_up_bias is None else experts.gate_up_bias,
        inner,
        K=hidden,
        N=num_inner,
        TOP_K=top_k,
        HAS_BIAS=experts.gate_up_bias is not None,
        ALPHA=unit.alpha,
        LIMIT=unit.limit,
        OFFSET=unit.offset,
        ONCE=num_tokens == 1,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **early,
    )
    block_n, block_k, num_warps = _down_tile(num_inner)
    _down_kernel[(num_tokens, cdiv(hidden, block_n))](
        inner,
        shares,
        ids,
        experts.down,
        experts.down if experts.down_bias is None else experts.down_bias,
        inner if base is None else base,
        out,
        int(base is not None),
        K=num_inner,
        N=hidden,
        TOP_K=top_k,
        HAS_BIAS=experts.down_bias is not None,
        ONCE=num_tokens == 1,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **early,
    )
    return out


# Outputs and inputs per program and its warps: the best of searches on an H200 over the shapes of three models.


def _gate_up_tile(num_in: int) -> tuple[int, int, int]:
    return 1, _stretch(num_in, 1024), 2


def _down_tile(num_in: int) -> tuple[int, int, int]:
    """Inputs are those of each expert."""
    if num_in % 1024 == 0:
        return 1, 1024, 4
    return (2, 256, 1) if num_in % 256 == 0 else (1, _stretch(num_in, 128), 1)


def _stretch(num_in: int, most: int) -> int:
    """The largest power of two up to `most` that divides the inputs, unless that is small: masks cost less then."""
    divisor = num_in & -num_in
    return min(most, divisor if divisor >= 128 else next_power_of_2(num_in))
