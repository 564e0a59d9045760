"""The cache write in plain torch."""

from torch import Tensor

from hornbeam.ops.query import OpQuery


class ReferenceCacheWrite:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, rows: Tensor) -> None:
        """See `CacheWrite`."""
        k_pages.flatten(0, 1)[rows] = k
        v_pages.flatten(0, 1)[rows] = v


BACKEND = ReferenceCacheWrite()
