"""Rotary position embedding (Su et al., 2021) over the two halves of each head, from a table of cosines and sines."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class Rope(Protocol):
    """T tokens, heads of D features; dimension i of a head turns together with dimension i + D/2."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> None:
        """Rotate q [T, Hq, D] and k [T, Hk, D] in place (strided views are fine).

        positions: [T] int64; table: [P, D] float32, D/2 cosines then D/2 sines per position.
        """


ROPE: Registry[OpQuery, Rope] = Registry(
    "rope", {"triton": "hornbeam.ops.rope.triton:BACKEND", "reference": "hornbeam.ops.rope.reference:BACKEND"}
)
