"""Dense products by torch, which calls the vendor's library."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.query import OpQuery


class ReferenceLinear:
    """Serves every device and shape."""

    fused_rows = 0

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def prepare(self, weights: Sequence[Tensor], num_rows: Sequence[int]) -> None:
        """There is one way only."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearProduct`."""
        return F.linear(x, weight, bias)

    def wide(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `LinearProduct`."""
        return F.linear(x.float(), weight.float())

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LinearProduct`."""
        return F.linear(x, weight, bias), residual

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
        total = x if residual is None else x + residual
        normed = total if norm is None else ReferenceNorm().rms_norm(total, norm.weight, norm.eps)
        out = F.linear(normed, weight, bias)
        return ReferenceActivation().silu_mul(out) if gated else out, total


BACKEND = ReferenceLinear()
