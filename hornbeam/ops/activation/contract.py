"""The gated activations of feed-forward layers (Shazeer, 2020)."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class Activation(Protocol):
    """T tokens, I inner features."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(x[:, :I]) * x[:, I:], of [T, 2I] -> [T, I]."""

    def silu_mul_product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """`silu_mul` of x W^T, of [T, K] and [2I, K] -> [T, I], where one kernel for both is faster; None elsewhere."""

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        """The same with GELU (Hendrycks and Gimpel, 2016) in its approximation by tanh."""


ACTIVATION: Registry[OpQuery, Activation] = Registry(
    "activation",
    {
        "triton": "hornbeam.ops.activation.triton:BACKEND",
        "cpu": "hornbeam.ops.activation.cpu:BACKEND",
        "reference": "hornbeam.ops.activation.reference:BACKEND",
    },
)
