"""How the weight of a product is kept, and what is fused with the product then: one value per layer."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.ops.activation.contract import Activation
from hornbeam.ops.linear.contract import Fp8Product, Fp8Weight, InputNorm, LinearProduct, PackedWeight


class Encoding(Protocol):
    """A weight [N, K] and perhaps a bias [N]."""

    def linear(self, x: Tensor) -> Tensor:
        """x [T, K] -> x W^T + b, [T, N]."""

    def gated(self, x: Tensor) -> Tensor:
        """The same of silu(first half) * second half of x [T, 2 K]."""

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """Whether `normed` is worth it for so many rows."""

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `LinearProduct.normed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """The numbers themselves."""

    weight: Tensor
    bias: Tensor | None
    product: LinearProduct
    activation: Activation

    def linear(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.product.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.linear(self.activation.silu_mul(x))

    def added(self, x: Tensor, residual: Tensor, *, gated: bool) -> tuple[Tensor, Tensor | None]:
        """See `LinearProduct.added`; of x, or gated."""
        return self.product.added(self.activation.silu_mul(x) if gated else x, self.weight, self.bias, residual)

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """See `Encoding`."""
        return 1 <= num_rows <= self.product.fused_rows

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `Encoding`."""
        return self.product.normed(x, residual, norm, self.weight, self.bias, gated=gated)

    def gate(self, x: Tensor) -> Tensor | None:
        """silu(first half) * second half of `linear` [T, N / 2], where that is one kernel; None elsewhere."""
        if self.fuses(x.shape[0], gated=True):
            return self.product.normed(x, None, None, self.weight, self.bias, gated=True)[0]
        return self.activation.silu_mul_product(x, self.weight) if self.bias is None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Eight-bit floats in blocks with scales."""

    weight: Fp8Weight
    bias: Tensor | None
    product: Fp8Product

    def linear(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.product.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.product.gated(x, self.weight, self.bias)

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """See `Encoding`."""
        return not gated and 1 <= num_rows <= self.product.fused_rows

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `Encoding`."""
        assert not gated, "down takes gate and up"
        return self.product.normed(x, residual, norm, self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Integers with scales of groups."""

    weight: PackedWeight
    bias: Tensor | None
    activation: Activation

    def linear(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.weight.linear(x, self.bias)

    def gated(self, x: Tensor) -> Tensor:
        """See `Encoding`."""
        return self.linear(self.activation.silu_mul(x))

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """See `Encoding`."""
        return self.weight.fuses(gated=gated)

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `Encoding`."""
        return self.weight.normed(x, residual, norm, self.bias, gated=gated)
