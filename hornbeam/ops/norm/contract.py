"""RMS normalisation (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class Norm(Protocol):
    """T tokens, H features; the result has the dtype of `x`, the weight the same or float32."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] -> [T, H]."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to `residual` in place, both [T, H], and return the normalised sum."""


NORM: Registry[OpQuery, Norm] = Registry(
    "norm",
    {
        "triton": "hornbeam.ops.norm.triton:BACKEND",
        "cpu": "hornbeam.ops.norm.cpu:BACKEND",
        "reference": "hornbeam.ops.norm.reference:BACKEND",
    },
)
