"""Dense products of activations with weight matrices."""

from collections.abc import Sequence
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

    def prepare(self, weights: Sequence[Tensor], num_rows: Sequence[int]) -> None:
        """Find out how each of `weights` [N, K] is multiplied best with these numbers of rows; only for speed."""

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


SCALE_BLOCK = 128  # consecutive features of a token that share a scale; a weight's scale is of as many rows and columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A matrix [N, K] in blocks of 128 x 128 (the last ones may be smaller), each with a scale to multiply with."""

    values: Tensor  # [N, K] float8_e4m3fn
    scales: Tensor  # [ceil(N / 128), ceil(K / 128)] float32
    power_of_two: bool  # the scales of activations are rounded up to powers of two


class Fp8Product(Protocol):
    """Products of eight-bit floats: each 128 features of a row of activations are rounded on the way.

    Their scale is max(max|x|, 1e-10) / 448, maybe rounded up to a power of two; they become float8_e4m3fn of x / scale.
    Sums are in float32, the result has the dtype of `x`. How a row is rounded depends on it alone, not on the batch.
    """

    fused_rows: int  # as in `LinearProduct`
    gated_rows: int  # the most tokens for which `normed` is worth it with a gate; for more, `gated` is

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def linear(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """x [T, K], bias [N] -> x W^T + b, [T, N]."""

    def gated(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """The same of silu(first half) * second half of x [T, 2 K]."""

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm,
        weight: Fp8Weight,
        bias: Tensor | None,
        *,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `LinearProduct.normed`. What is normalised, and what is gated, is in the dtype of `x` first."""


FP8_LINEAR: Registry[OpQuery, Fp8Product] = Registry(
    "fp8_linear",
    {"triton": "hornbeam.ops.linear.fp8_triton:BACKEND", "reference": "hornbeam.ops.linear.fp8_reference:BACKEND"},
)
