"""Mixtures of experts: which experts a token goes to, and the weighted sum of what they make of it.

T tokens, H hidden features, E experts of I inner features, of which each token takes k.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hornbeam.core.fp8 import Fp8Format
from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """How scores are made of logits, experts chosen by their scores, and weights made of the scores of the chosen.

    With groups (runs of E / num_groups experts), only the experts of the best num_kept_groups
    can be chosen. softmax of all with `renormalize` equals the softmax of the chosen logits alone.
    """

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool  # weights sum to `factor`
    factor: float = 1.0  # of all weights
    num_groups: int = 1
    num_kept_groups: int = 1
    group_score: Literal["best", "two_best"] = "best"  # of its experts: the best, or the sum of the best two


class Routing(Protocol):
    """Chooses experts."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def route(
        self,
        logits: Tensor,
        rule: RoutingRule,
        correction: Tensor | None = None,
        expert_map: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [T, E] -> weights [T, k] float32 and expert ids [T, k] int32, best first; computed in float32.

        The logits may also be [parts, T, E] float32: their sum over the parts.
        correction: [E] float32, added to the scores for the choice, not in the weights.
        expert_map: [E] int32, the id to return for each expert, -1: none here; None: its own.
        padding: [T] bool, tokens whose ids are all -1.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedUnit:
    """(up + offset) * gate * sigmoid(alpha * gate), where gate is at most `limit` and up within +-limit.

    As it stands, silu(gate) * up.
    """

    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """What is fixed for the life of a layer, on one rank."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    unit: GatedUnit
    fp8: Fp8Format | None = None  # of weights that have scales
    dtype: torch.dtype
    device: torch.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights; `dtype` is that of activations."""
        return self.dtype if self.fp8 is None else torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Of all experts, stacked."""

    gate_up: Tensor  # [E, 2 I, H]: rows of the gate, then of up
    down: Tensor  # [E, H, I]
    gate_up_bias: Tensor | None = None  # [E, 2 I]
    down_bias: Tensor | None = None  # [E, H]
    # Weights with scales are float8_e4m3fn in blocks; what they are multiplied with is rounded, as `Fp8Product` says.
    gate_up_scales: Tensor | None = None  # [E, ceil(2 I / 128), ceil(H / 128)]
    down_scales: Tensor | None = None  # [E, ceil(H / 128), ceil(I / 128)]


class Experts(Protocol):
    """The experts of one layer."""

    def __call__(
        self, x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights, base: Tensor | None = None
    ) -> Tensor:
        """base + sum over each token's ids of weight * expert(x): x and base [T, H], weights and ids [T, k] -> [T, H].

        An id of -1 adds nothing, whatever its weight. The sum is in float32, the result has the dtype of `x`.
        """


class ExpertsBackend(Protocol):
    """A registry entry: says what it can do and makes instances."""

    captures: bool  # instances can run inside a device graph

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def create(self, shape: ExpertsShape) -> Experts:
        """An instance for layers of this shape."""


ROUTING: Registry[OpQuery, Routing] = Registry(
    "routing", {"triton": "hornbeam.ops.moe.triton_routing:BACKEND", "reference": "hornbeam.ops.moe.reference:ROUTING"}
)
EXPERTS: Registry[OpQuery, ExpertsBackend] = Registry(
    "experts", {"triton": "hornbeam.ops.moe.triton:BACKEND", "reference": "hornbeam.ops.moe.reference:EXPERTS"}
)
