"""Mixtures of experts in plain torch: a loop over the experts that are hit, not over tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.core.fp8 import Fp8Format
from hornbeam.ops.linear.contract import Fp8Weight
from hornbeam.ops.linear.fp8_reference import BACKEND as FP8_LINEAR
from hornbeam.ops.moe.contract import Experts, ExpertsShape, ExpertWeights, GatedUnit, RoutingRule
from hornbeam.ops.query import OpQuery


class ReferenceRouting:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def route(
        self,
        logits: Tensor,
        rule: RoutingRule,
        correction: Tensor | None = None,
        expert_map: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Routing`."""
        wide = logits.float() if logits.ndim == 2 else logits.sum(0)
        scores = wide.softmax(-1) if rule.scores == "softmax" else wide.sigmoid()
        choice = scores if correction is None else scores + correction
        if rule.num_groups > 1:
            choice = _of_best_groups(choice, rule)
        ids = choice.topk(rule.top_k, -1).indices
        weights = scores.gather(1, ids)
        if rule.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        ids = ids.int() if expert_map is None else expert_map[ids]
        if padding is not None:
            ids = ids.masked_fill(padding[:, None], -1)
        return weights * rule.factor, ids


def _of_best_groups(choice: Tensor, rule: RoutingRule) -> Tensor:
    """The values [T, E] with those of other groups at -inf: a correction may make values of kept groups negative."""
    groups: Tensor = choice.unflatten(1, (rule.num_groups, -1))
    best = groups.topk(2 if rule.group_score == "two_best" else 1, -1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(rule.num_kept_groups, -1).indices, True)
    rest: Tensor = groups.masked_fill(~kept[:, :, None], float("-inf"))
    return rest.flatten(1)


def gated(gate_up: Tensor, unit: GatedUnit) -> Tensor:
    """[T, 2 I] -> [T, I]."""
    gate, up = gate_up.float().chunk(2, -1)
    if unit.limit is not None:
        gate, up = gate.clamp(max=unit.limit), up.clamp(-unit.limit, unit.limit)
    out: Tensor = (up + unit.offset) * gate * torch.sigmoid(unit.alpha * gate)
    return out.to(gate_up.dtype)


class ReferenceExperts:
    """Reads on the host which experts are hit, so it cannot run inside a graph."""

    def __init__(self, shape: ExpertsShape) -> None:
        self._shape = shape

    def __call__(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, base: Tensor | None = None
    ) -> Tensor:
        """See `Experts`."""
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten() + 1, minlength=self._shape.num_experts + 1).tolist()
        out = torch.zeros_like(x, dtype=torch.float32) if base is None else base.to(torch.float32, copy=True)
        for expert, pairs in enumerate(order.split(counts), start=-1):
            if expert < 0 or not len(pairs):
                continue
            tokens = pairs // ids.shape[1]
            part = _expert(x[tokens], expert, experts, self._shape)
            out.index_add_(0, tokens, part.float() * weights.flatten()[pairs, None])
        return out.to(x.dtype)


def _expert(x: Tensor, expert: int, experts: ExpertWeights, shape: ExpertsShape) -> Tensor:
    first = experts.gate_up, experts.gate_up_scales, experts.gate_up_bias
    second = experts.down, experts.down_scales, experts.down_bias
    inner = gated(_product(x, expert, *first, fp8=shape.fp8), shape.unit)
    return _product(inner, expert, *second, fp8=shape.fp8)


def _product(
    x: Tensor, expert: int, weights: Tensor, scales: Tensor | None, biases: Tensor | None, *, fp8: Fp8Format | None
) -> Tensor:
    bias = None if biases is None else biases[expert]
    if scales is None or fp8 is None:
        return F.linear(x, weights[expert], bias)
    weight = Fp8Weight(values=weights[expert], scales=scales[expert], power_of_two=fp8.power_of_two)
    return FP8_LINEAR.linear(x, weight, bias)


class ReferenceBackend:
    """Serves every device and shape."""

    captures = False

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def create(self, shape: ExpertsShape) -> Experts:
        """See `ExpertsBackend`."""
        return ReferenceExperts(shape)


ROUTING = ReferenceRouting()
EXPERTS = ReferenceBackend()
