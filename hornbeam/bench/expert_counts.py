"""Counts how many experts the layers of a mixture take in each step, beside what uniform routing lets expect.

The weights that a step reads depend on it, so the speed of a model with random weights means little without. Works by
a routing backend of its own around the one that would be chosen, so it costs an engine that does not count nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.moe.contract import ROUTING, Routing, RoutingRule
from hornbeam.ops.query import OpQuery

_LEAST_RATIO = 0.98  # below, a run reads so much less than it would with uniform routing that its speed does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """Means over layers and steps."""

    distinct: float  # experts that some token took
    expected: float  # the same under uniform routing

    @property
    def ratio(self) -> float:
        """Of the two."""
        return self.distinct / self.expected

    def line(self) -> str:
        """For people."""
        verdict = "" if self.ratio >= _LEAST_RATIO else ": too few, this run does not count"
        found = f"{self.distinct:.2f} per layer and step, {self.expected:.2f} under uniform routing"
        return f"  distinct experts: {found}, ratio {self.ratio:.4f}{verdict}"


class CountingRouting:
    """See `Routing`."""

    def __init__(self) -> None:
        self.others: Registry[OpQuery, Routing] = Registry("routing")
        self._inner: Routing | None = None
        self._totals = torch.zeros(3, dtype=torch.float64)

    def supports(self, query: OpQuery) -> str | None:
        """What the backend does that is wrapped, the first that supports."""
        self._inner = self.others.choose(query).value
        self._totals = torch.zeros(3, dtype=torch.float64, device=query.device)
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
        assert self._inner is not None
        weights, ids = self._inner.route(logits, rule, correction, expert_map, padding)
        count_experts(ids, logits.shape[1], self._totals)
        return weights, ids

    def take(self) -> ExpertCounts | None:
        """What was counted since the last time; None: nothing."""
        distinct, expected, num_calls = self._totals.tolist()
        self._totals.zero_()
        return ExpertCounts(distinct=distinct / num_calls, expected=expected / num_calls) if num_calls else None


def count_experts(ids: Tensor, num_experts: int, totals: Tensor) -> None:
    """Add to totals [3] float64: distinct ids of [T, k], what uniform routing lets expect, 1; if there are tokens."""
    missing = 1 - ids.shape[1] / num_experts  # chance that a token does not take a given expert
    if ids.is_cuda:
        from hornbeam.bench.triton_expert_counts import count_experts_kernel

        count_experts_kernel(ids, num_experts, missing, totals)
        return
    counts = torch.bincount(ids.flatten() + 1, minlength=num_experts + 1)
    num_tokens = int((ids >= 0).any(1).sum())
    if num_tokens:
        expected = num_experts * (1 - math.pow(missing, num_tokens))
        totals += torch.tensor([float((counts[1:] > 0).sum()), expected, 1.0], dtype=torch.float64)


COUNTER = CountingRouting()


@contextmanager
def counted_experts() -> Iterator[CountingRouting]:
    """Engines that are built in this process inside count."""
    before = ROUTING.entries
    COUNTER.others.entries = before
    ROUTING.entries = {"counted": "hornbeam.bench.expert_counts:COUNTER", **before}
    try:
        yield COUNTER
    finally:
        ROUTING.entries = before
