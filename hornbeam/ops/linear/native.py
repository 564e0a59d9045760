"""Products with few rows in float32 on a CPU, which mostly read the weights, by kernels of our own; see `ops.native`.

For more rows the vendor's library is as fast or faster: of 576 x 3072 weights, in microseconds on two cores, beside
other work, ours took 478 and the library 673 for one row, 439 and 1121 for 4, 794 and 1393 for 16, 11,408 and 10,482
for 200.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.linear.native_product import LANES, Weights, product
from hornbeam.ops.linear.reference import ReferenceLinear
from hornbeam.ops.native.loader import needs_library
from hornbeam.ops.query import OpQuery

_MOST_ROWS = 64


class NativeLinear:
    """See `LinearProduct`."""

    fused_rows = _MOST_ROWS

    def supports(self, query: OpQuery) -> str | None:
        """CPUs with the instructions that the kernels are written in, and a compiler."""
        return needs_library(query)

    def prepare(self, weights: Sequence[Tensor], num_rows: Sequence[int]) -> None:
        """There is nothing to find out."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearProduct`."""
        if x.shape[0] > _MOST_ROWS or weight.dtype != torch.float32 or not weight.is_contiguous():
            return F.linear(x, weight, bias)
        return product(_floats(weight), x, bias)[0]

    def wide(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `LinearProduct`."""
        return self.linear(x.float(), weight.float(), None)

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LinearProduct`."""
        return self.linear(x, weight, bias), residual

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
        """See `LinearProduct`."""
        if gated and weight.shape[0] % (2 * LANES):
            return ReferenceLinear().normed(x, residual, norm, weight, bias, gated=True)
        return product(_floats(weight), x, bias, residual=residual, norm=norm, gated=gated)


def _floats(weight: Tensor) -> Weights:
    return Weights(data=weight.data_ptr(), inputs=weight.shape[1], outputs=weight.shape[0], bits=32)


BACKEND = NativeLinear()
