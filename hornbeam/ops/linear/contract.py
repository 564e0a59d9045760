"""Dense products of activations with weight matrices."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class LinearProduct(Protocol):
    """T tokens, K input and N output features. Sums are in float32, the result has the dtype of `x`."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], weight [N, K], bias [N] -> x W^T + b, [T, N]."""


LINEAR: Registry[OpQuery, LinearProduct] = Registry(
    "linear", {"triton": "hornbeam.ops.linear.triton:BACKEND", "reference": "hornbeam.ops.linear.reference:BACKEND"}
)
