"""Dense products by torch, which calls the vendor's library."""

import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.query import OpQuery


class ReferenceLinear:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearProduct`."""
        return F.linear(x, weight, bias)


BACKEND = ReferenceLinear()
