"""Rotary position embedding in plain torch."""

import torch
from torch import Tensor

from hornbeam.ops.query import OpQuery


class ReferenceRope:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
        """See `Rope`."""
        cos, sin = table[positions].unsqueeze(1).chunk(2, -1)
        for x in (q, k):
            first, second = x.float().chunk(2, -1)
            rotated = first * cos - second * sin, second * cos + first * sin
            x.copy_(torch.cat(rotated, -1))


BACKEND = ReferenceRope()
