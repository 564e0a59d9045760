"""Dense products of activations with weight matrices."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class InputNorm:
    """RMS normalisation ahead of a product, of the sum of its input and a residual."""

    weight: Tensor  # [K]
    eps: float


class LinearProduct(Protocol):
    """T tokens, K input and N output features. Sums are in float32, the result has the dtype of `x`."""

    fused_rows: int  # the most tokens for which `normed` is worth it; for more, the parts are called one by one

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], weight [N, K], bias [N] -> x W^T + b, [T, N]."""

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, weight: Tensor, bias: Tensor | None, *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """norm(x + residual) W^T + b, and x + residual [T, K]; x and residual [T, K] stay as they are.

        gated: the first half of the outputs are gates: what is returned is silu(first half) * second half, [T, N / 2].
        """


LINEAR: Registry[OpQuery, LinearProduct] = Registry(
    "linear", {"triton": "hornbeam.ops.linear.triton:BACKEND", "reference": "hornbeam.ops.linear.reference:BACKEND"}
)


class Int8Product(Protocol):
    """Products of integers: weights have a scale per output, and each row of activations is rounded on the way.

    A row becomes the sum of two of int8 with a scale each: round(127 x / max|x|), and the same of what that leaves.
    Sums are exact, in int32. How a row is rounded depends on it alone, not on the rest of a batch.
    """

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def linear(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] float32, values [N, K] int8, scales [N] float32, bias [N] -> [T, N] float32."""


INT8_LINEAR: Registry[OpQuery, Int8Product] = Registry(
    "int8_linear",
    {
        "cpu": "hornbeam.ops.linear.int8_cpu:BACKEND",
        "reference": "hornbeam.ops.linear.int8_reference:BACKEND",
    },
)
