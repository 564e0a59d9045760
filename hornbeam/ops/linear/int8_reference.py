"""Integer products in plain torch: floats that hold the integers, in float64, which sums them exactly."""

import torch
from torch import Tensor

from hornbeam.ops.query import OpQuery

LARGEST = 127
_SMALLEST_RANGE = 1e-30  # of a row of zeros, which must not be divided by zero


class ReferenceInt8:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def linear(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """See `Int8Product`."""
        rounded, row_scales = two_terms(x)
        out = (rounded.double() @ values.double().T).float() * scales * row_scales
        out = out[: len(x)] + out[len(x) :]
        return out if bias is None else out + bias


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] float32 -> [T, K] int8 and scales [T, 1] float32, whose product is nearly x."""
    largest = x.abs().amax(-1, keepdim=True).clamp_(min=_SMALLEST_RANGE)
    rounded = (x * (LARGEST / largest)).round_().to(torch.int8)
    return rounded, largest.div_(LARGEST)


def two_terms(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] float32 -> [2 T, K] int8 and scales [2 T, 1]: all first terms, then all second ones."""
    first = quantize_rows(x)
    second = quantize_rows(torch.addcmul(x, *first, value=-1))
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]))


BACKEND = ReferenceInt8()
