"""Rotary position embedding in plain torch."""

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
            half = first.shape[-1]
            x[..., :half] = first * cos - second * sin
            x[..., half:] = second * cos + first * sin


BACKEND = ReferenceRope()
