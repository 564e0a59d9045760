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
        """Find out how `weights` [N, K] of layers are multiplied best with these numbers of rows; only for speed."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], weight [N, K], bias [N] -> x W^T + b, [T, N]."""

    def wide(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] in the same dtype or in float32 -> x W^T, [T, N] float32: no digits are lost.

        Or its sums over stretches of the inputs, [parts, T, N] float32, for who takes it to add up.
        """

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """x W^T + b, and the residual [T, N] that is still to be added to it.

        Where the product adds it on the way, and rounds once, the first is the sum, in the residual's memory, and there
        is no second. Where several parts of the device sum up stretches of the inputs, the first may be those sums,
        [parts, T, N] float32, which `Norm.add_rms_norm` adds up.
        """

    def normed(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm | None,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """norm(x + residual) W^T + b, and x + residual [T, K]; x and residual [T, K] stay as they are.

        norm: None for the sum as it is.
        gated: the first half of the outputs are gates: what is returned is silu(first half) * second half, [T, N / 2].
        """


LINEAR: Registry[OpQuery, LinearProduct] = Registry(
    "linear",
    {
        "triton": "hornbeam.ops.linear.triton:BACKEND",
        "native": "hornbeam.ops.linear.native:BACKEND",
        "reference": "hornbeam.ops.linear.reference:BACKEND",
    },
)


GROUP_SIZE = 32  # consecutive features that share a scale
OUTLIER = 4  # root mean squares of a row: a group with a larger magnitude is rounded more finely


class PackedWeight(Protocol):
    """A weight matrix [N, K] as the products of one backend read it."""

    def fuses(self, *, gated: bool) -> bool:
        """Whether there is a `normed`."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] float32, bias [N] -> x W^T + b, [T, N]."""

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, bias: Tensor | None, *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """See `LinearProduct.normed`."""


class GroupedProduct(Protocol):
    """Products of integers, by groups of 32 features (the last one may be smaller).

    A weight is scale * code + minimum, with a scale and a minimum of float16 for each group of each output. Codes have
    four bits if every group of the matrix lies on a grid of at most 16 values, as those of most quantized files do, so
    that nothing is lost; else they have eight. Of these, groups on a grid of 32 values or of integers up to 127 keep
    it, and others are rounded, from their smallest value to their largest. Groups of activations
    become round(127 x / max|x|), half to even; where max|x| is above OUTLIER, what that leaves is rounded to a second
    term, 254 times as fine: few groups have such outliers, but most of the error would come from them. Sums within a
    group are exact, and those of groups are in float32 and in order: what a row becomes does not depend on the batch.
    """

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def pack(self, weight: Tensor) -> PackedWeight:
        """Encode a weight [N, K] float32, which may be freed or changed afterwards."""


GROUPED_LINEAR: Registry[OpQuery, GroupedProduct] = Registry(
    "grouped_linear",
    {
        "native": "hornbeam.ops.linear.grouped_native:BACKEND",
        "reference": "hornbeam.ops.linear.grouped_reference:BACKEND",
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

    fused_rows: int  # the most tokens for which `normed` is worth it

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def linear(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """x [T, K], bias [N] -> x W^T + b, [T, N]."""

    def gated(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """The same of silu(first half) * second half of x [T, 2 K], in the dtype of `x` before it is rounded."""

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, weight: Fp8Weight, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same of norm(x + residual), and x + residual [T, K]; x and residual [T, K] stay as they are."""


FP8_LINEAR: Registry[OpQuery, Fp8Product] = Registry(
    "fp8_linear",
    {"triton": "hornbeam.ops.linear.fp8_triton:BACKEND", "reference": "hornbeam.ops.linear.fp8_reference:BACKEND"},
)
