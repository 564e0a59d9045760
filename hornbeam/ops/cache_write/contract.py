"""Writing a step's new keys and values into their places in the paged cache."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class CacheWrite(Protocol):
    """T tokens, H key-value heads of D features; pages of size S."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def write(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, rows: Tensor) -> None:
        """Copy k and v [T, H, D] (strided views are fine) into k_pages and v_pages [P, S, H, D].

        rows: [T] int64, page * S + offset of each token. Tokens that share a row (padding) may land in any order.
        """


CACHE_WRITE: Registry[OpQuery, CacheWrite] = Registry(
    "cache_write",
    {"triton": "hornbeam.ops.cache_write.triton:BACKEND", "reference": "hornbeam.ops.cache_write.reference:BACKEND"},
)
