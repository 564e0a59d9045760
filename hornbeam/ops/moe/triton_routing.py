"""Routing as one kernel: a program per token holds the scores of all experts and takes the best, one by one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2
from hornbeam.ops.moe.contract import RoutingRule
from hornbeam.ops.query import OpQuery


@triton.jit
def _of_best_groups(
    choice,
    experts,
    PER_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    """Sets the values of experts outside of the best groups to -inf."""
    group_ids = tl.arange(0, GROUP_BLOCK)
    scores = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        members = tl.where(experts // PER_GROUP == group, choice, float("-inf"))
        score = tl.max(members, 0)
        if TWO_BEST:
            score += tl.max(tl.where(experts == tl.argmax(members, 0), float("-inf"), members), 0)
        scores = tl.where(group_ids == group, score, scores)
    kept = experts < 0
    for _ in tl.static_range(KEPT):
        best = tl.argmax(scores, 0)
        kept = kept | (experts // PER_GROUP == best)
        scores = tl.where(group_ids == best, float("-inf"), scores)
    return tl.where(kept, choice, float("-inf"))


@Kernel
@triton.jit
def _route_kernel(
    logits_ptr,
    correction_ptr,
    map_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    stride,
    part_stride,
    factor,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    CORRECTED: tl.constexpr,
    MAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token."""
    OUT: tl.constexpr = -(2**31)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, EXPERT_BLOCK)
    inside = experts < EXPERTS
    parts = tl.arange(0, PARTS)[:, None] * part_stride + experts[None, :]
    logits = tl.load(logits_ptr + token * stride + parts, mask=inside[None, :], other=float("-inf"))
    logits = tl.sum(logits.to(tl.float32), 0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        exponentials = tl.exp(logits - tl.max(logits, 0))
        scores = exponentials / tl.sum(exponentials, 0)
    choice = scores
    if CORRECTED:
        choice += tl.load(correction_ptr + experts, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if GROUPS > 1:
        choice = _of_best_groups(choice, experts, EXPERTS // GROUPS, GROUPS, KEPT, TWO_BEST, GROUP_BLOCK)
    # As integers of the same order, of which the hardware finds the highest among lanes in one instruction. Those that
    # are out are lower than any number, so that ids are right for logits that are none, too.
    keys = choice.to(tl.int32, bitcast=True)
    keys = tl.where(inside, tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys), OUT)
    slots = tl.arange(0, SLOT_BLOCK)
    ids = tl.zeros((SLOT_BLOCK,), tl.int32)
    for slot in range(TOP_K):  # unrolled it would be a kernel that is longer to fetch than to run
        best = tl.min(tl.where(keys == tl.max(keys, 0), experts, EXPERT_BLOCK), 0)
        ids = tl.where(slots == slot, best, ids)
        keys = tl.where(experts == best, OUT, keys)
    weights = tl.gather(scores, ids, 0)
    weights = tl.where(slots < TOP_K, weights, 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    taken = slots < TOP_K
    if MAPPED:
        ids = tl.load(map_ptr + ids, mask=taken, other=-1)
    if PADDED:
        ids = tl.where(tl.load(padding_ptr + token) != 0, -1, ids)
    tl.store(weights_ptr + token * TOP_K + slots, weights * factor, mask=taken)
    tl.store(ids_ptr + token * TOP_K + slots, ids, mask=taken)


class TritonRouting:
    """See `Routing`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def route(
        self,
        logits: Tensor,
        rule: RoutingRule,
        correction: Tensor | None = None,
        expert_map: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Routing`."""
        assert logits.stride(-1) == 1, "a token's logits must be adjacent"
        parts = logits if logits.ndim == 3 else logits[None]
        _, num_tokens, num_experts = parts.shape
        weights = torch.empty((num_tokens, rule.top_k), dtype=torch.float32, device=logits.device)
        ids = torch.empty((num_tokens, rule.top_k), dtype=torch.int32, device=logits.device)
        if num_tokens == 0:
            return weights, ids
        block = next_power_of_2(num_experts)
        _route_kernel[(num_tokens,)](
            logits,
            logits if correction is None else correction,
            ids if expert_map is None else expert_map,
            ids if padding is None else padding,
            weights,
            ids,
            parts.stride(1),
            parts.stride(0),
            rule.factor,
            PARTS=len(parts),
            EXPERTS=num_experts,
            TOP_K=rule.top_k,
            SIGMOID=rule.scores == "sigmoid",
            RENORMALIZE=rule.renormalize,
            GROUPS=rule.num_groups,
            KEPT=rule.num_kept_groups,
            TWO_BEST=rule.group_score == "two_best",
            CORRECTED=correction is not None,
            MAPPED=expert_map is not None,
            PADDED=padding is not None,
            EXPERT_BLOCK=block,
            SLOT_BLOCK=next_power_of_2(rule.top_k),
            GROUP_BLOCK=next_power_of_2(rule.num_groups),
            num_warps=1,
            **early_launch(logits.device),
        )
        return weights, ids


BACKEND = TritonRouting()
