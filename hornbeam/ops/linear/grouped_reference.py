"""Products of rounded activations with grouped weights in plain torch: weights are rounded, but kept in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.linear.contract import GROUP_SIZE, OUTLIER, InputNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.query import OpQuery

_LARGEST = 127  # of rounded activations
_FINER = 254  # how many steps of the second term make one of the first
_FOUR_BITS, _FIVE_BITS, _EIGHT_BITS = 15, 31, 255  # largest codes
_TOLERANCE = 0.02  # of a step, for values that were computed in another order


@dataclass(frozen=True, slots=True)
class ReferenceGroupedWeight:
    """See `PackedWeight`."""

    values: Tensor  # [N, K] float32, as the codes say

    def fuses(self, *, gated: bool) -> bool:
        """See `PackedWeight`."""
        return True

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        return F.linear(rounded_activations(x), self.values, bias)

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, bias: Tensor | None, *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PackedWeight`."""
        total = x if residual is None else x + residual
        out = self.linear(ReferenceNorm().rms_norm(total, norm.weight, norm.eps), bias)
        return ReferenceActivation().silu_mul(out) if gated else out, total


class ReferenceGrouped:
    """See `GroupedProduct`."""

    def supports(self, query: OpQuery) -> str | None:
        """Float32 on every device."""
        return None if query.dtype == "float32" else "needs float32"

    def pack(self, weight: Tensor) -> ReferenceGroupedWeight:
        """See `GroupedProduct`."""
        return ReferenceGroupedWeight(rounded_weight(weight.detach()))


def rounded_activations(x: Tensor) -> Tensor:
    """[T, K] float32 -> the same after rounding; see `GroupedProduct`."""
    groups = F.pad(x, (0, -x.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))
    largest = groups.abs().amax(-1, keepdim=True)
    scaled = groups * torch.where(largest > 0, _LARGEST / largest, 0.0)
    codes = scaled.round()
    outliers = largest > OUTLIER * x.square().mean(-1, keepdim=True).sqrt().unsqueeze(-1)
    codes += outliers * ((scaled - codes) * _FINER).round() / _FINER
    return _flat(codes * (largest / _LARGEST), x.shape[1])


def rounded_weight(weight: Tensor) -> Tensor:
    """[N, K] float32 -> the same after encoding; see `GroupedProduct`."""
    padding = weight[:, -1:].expand(-1, -weight.shape[1] % GROUP_SIZE)  # by values that occur anyway
    groups = torch.cat((weight, padding), 1).unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = _grid(groups, low, high, _FOUR_BITS)
    if not (scales >= 0).all():
        by_magnitude = torch.maximum(high, -low) / _LARGEST
        coarser = _grid(groups, low, high, _FIVE_BITS)
        coarser = torch.where(coarser < 0, (high - low) / _EIGHT_BITS, coarser)
        scales = torch.where(_on_grid(groups, low, by_magnitude), by_magnitude, coarser)
    scales, low = scales.half().float(), low.half().float()
    codes = ((groups - low) / scales).round().nan_to_num(0, 0, 0).clamp(0, _EIGHT_BITS)
    return _flat(codes * scales + low, weight.shape[1])


def _grid(groups: Tensor, low: Tensor, high: Tensor, most_steps: int) -> Tensor:
    """Steps [N, G, 1] of the finest grid, of at most `most_steps`, that each group lies on; -1 where there is none."""
    scales = torch.full_like(low, -1.0).masked_fill(low == high, 0.0)
    for steps in range(most_steps, 0, -1):
        scale = (high - low) / steps
        scales = torch.where((scales < 0) & _on_grid(groups, low, scale), scale, scales)
    return scales


def _on_grid(groups: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    places = (groups - low) / scale
    fits: Tensor = (places - places.round()).abs().amax(-1, keepdim=True) < _TOLERANCE
    return fits


def _flat(groups: Tensor, size: int) -> Tensor:
    return groups.flatten(1)[:, :size]


BACKEND = ReferenceGrouped()
