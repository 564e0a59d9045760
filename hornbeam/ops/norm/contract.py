"""RMS normalisation (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery

PART_COUNTS = (2, 3, 4)  # into so many parts products may leave their sums


class Norm(Protocol):
    """T tokens, H features; the result has the dtype of `x`, the weight the same or float32."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] -> [T, H]."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to `residual` in place, both [T, H], and return the normalised sum, in the residual's dtype.

        x may also be [parts, T, H] float32, see PART_COUNTS: what is added then is the sum of the parts.
        """


NORM: Registry[OpQuery, Norm] = Registry(
    "norm",
    {
        "triton": "hornbeam.ops.norm.triton:BACKEND",
        "cpu": "hornbeam.ops.norm.cpu:BACKEND",
        "reference": "hornbeam.ops.norm.reference:BACKEND",
    },
)
