"""Mixture-of-experts layers: a gate, routed experts, and experts that every token takes.

Experts are shared out over `moe_ep`, their inner features over `moe_tp`. How tokens reach experts of other ranks, and
how their sums come back, is an `Exchange`; with one rank there is nothing to send.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from hornbeam.core.family import MixtureShape
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.parameters import empty_parameter, freed, plain_weight, weight_parameters
from hornbeam.ops.moe.contract import ExpertsShape, ExpertWeights, GatedUnit, RoutingRule


class Exchange(Protocol):
    """Brings tokens to the ranks that have their experts, and sums of experts back. Between the two, work can overlap.

    `dispatch` takes x [T, H], weights [T, k] and physical expert ids [T, k] of this rank's tokens, and returns the same
    of the R rows that this rank's experts must compute, with ids of its own experts, -1: elsewhere. `combine` takes
    the experts' weighted sums of those rows, [R, H], and returns the sums over ranks of this rank's tokens, [T, H].
    """

    keeps_rows: bool  # the rows to compute are this rank's tokens, and so are the sums: nothing is sent

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send tokens out."""

    def combine(self, sums: Tensor) -> Tensor:
        """Bring the sums of the last dispatch back."""


class LocalExchange:
    """All experts are here."""

    keeps_rows = True

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange`."""
        return x, weights, ids

    def combine(self, sums: Tensor) -> Tensor:
        """See `Exchange`."""
        return sums


class StackedLinear(nn.Module):
    """One linear map per expert, with fused parts along the outputs like `Linear`: the weights alone."""

    def __init__(
        self, num_experts: int, in_features: int, parts: tuple[int, ...], context: BuildContext, *, bias: bool
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.parts = parts
        self.weight, self.scales = weight_parameters((num_experts,), parts, in_features, context)
        self.bias = empty_parameter((num_experts, sum(parts)), context) if bias else None

    def keep_plain(self, dtype: torch.dtype) -> None:
        """Put an empty weight of `dtype` in the place of one in blocks."""
        self.weight, self.scales = plain_weight(self.weight, dtype), None


class RoutedExperts(nn.Module):
    """This rank's share of the experts."""

    def __init__(
        self, hidden_size: int, mixture: MixtureShape, unit: GatedUnit, context: BuildContext, *, bias: bool
    ) -> None:
        super().__init__()
        assert context.kernels.experts is not None, "the config of a mixture model must have its mixture"
        grid = context.grid
        num_experts = grid.moe_ep.share(mixture.num_experts, "experts")
        inner = grid.moe_tp.share(mixture.intermediate_size, "inner features of an expert")
        self.gate_up = StackedLinear(num_experts, hidden_size, (inner, inner), context, bias=bias)
        self.down = StackedLinear(num_experts, inner, (hidden_size,), context, bias=bias)
        self._experts = context.kernels.experts.create(
            ExpertsShape(
                num_experts=num_experts,
                top_k=mixture.top_k,
                hidden_size=hidden_size,
                intermediate_size=inner,
                unit=unit,
                fp8=context.fp8,
                dtype=context.dtype,
                device=context.device,
            )
        )

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor | None = None) -> Tensor:
        """x [R, H], weights and ids [R, k] -> weighted sums [R, H], and what they are added to, `base` [R, H]."""
        experts = ExpertWeights(
            gate_up=self.gate_up.weight,
            down=self.down.weight,
            gate_up_bias=self.gate_up.bias,
            down_bias=self.down.bias,
            gate_up_scales=self.gate_up.scales,
            down_scales=self.down.scales,
        )
        return self._experts(x, weights, ids, experts, base)


class SharedExpert(nn.Module):
    """What every token takes; with `gated`, in the share that a sigmoid of its own says."""

    def __init__(self, hidden_size: int, intermediate_size: int, context: BuildContext, *, gated: bool) -> None:
        super().__init__()
        self.mlp = GatedMLP(hidden_size, intermediate_size, context)
        self.share = Linear(hidden_size, (1,), context, split="none", quantized=False) if gated else None

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        out = self.mlp(x, fwd)
        return out if self.share is None else torch.sigmoid(self.share(x, fwd)) * out


class WideGate(nn.Module):
    """A gate in float32, whatever the model computes in: rounding decides between experts whose scores are close.

    Most checkpoints have its weight in half precision, and it is kept so if that loses nothing: products are as exact.
    """

    def __init__(self, hidden_size: int, num_experts: int, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter((num_experts, hidden_size), context, torch.float32)
        self._narrow: Tensor | None = None
        self._dtype = context.dtype
        self._product = context.kernels.linear

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, E] float32, or in parts: see `LinearProduct.wide`."""
        return self._product.wide(x, self.weight if self._narrow is None else self._narrow)

    def refresh_derived(self) -> None:
        """Narrow the weight if that loses nothing, and free it. Does nothing if it is freed already."""
        if self._dtype == torch.float32 or self.weight.is_meta:
            return
        self._narrow = self.weight.to(self._dtype)
        if torch.equal(self._narrow.float(), self.weight):
            self.weight = freed(self.weight)
        else:
            self._narrow = None


class MoE(nn.Module):
    """Routed experts by `rule`, and beside them what `shared` adds."""

    def __init__(
        self,
        hidden_size: int,
        mixture: MixtureShape,
        rule: RoutingRule,
        context: BuildContext,
        *,
        unit: GatedUnit | None = None,
        bias: bool = False,
        corrected: bool = False,
        shared: SharedExpert | None = None,
    ) -> None:
        """`bias` gives one to the gate and to both products of the experts; unit None: SwiGLU.

        corrected: the choice of experts, not their weights, follows scores to which `correction` is added.
        """
        super().__init__()
        assert context.kernels.routing is not None
        self.gate = (
            Linear(hidden_size, (mixture.num_experts,), context, bias=True, split="none", quantized=False)
            if bias
            else WideGate(hidden_size, mixture.num_experts, context)
        )
        self.experts = RoutedExperts(hidden_size, mixture, unit or GatedUnit(), context, bias=bias)
        self.correction = empty_parameter((mixture.num_experts,), context, torch.float32) if corrected else None
        self.shared = shared
        self.expert_map: Tensor | None = None  # [E] int32: the physical id of each logical expert; None: its own
        self._rule = rule
        self._routing = context.kernels.routing
        self._exchange: Exchange = LocalExchange()

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        logits = self.gate(x, fwd)
        weights, ids = self._routing.route(logits, self._rule, self.correction, self.expert_map, fwd.padding)
        shared = None if self.shared is None else self.shared(x, fwd)  # its weights arrive while experts are chosen
        arrived = self._exchange.dispatch(x, weights, ids)
        if self._exchange.keeps_rows:
            return self._exchange.combine(self.experts(*arrived, shared))
        out = self._exchange.combine(self.experts(*arrived))
        return out if shared is None else out + shared
