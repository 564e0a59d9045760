"""What happens to queries, keys and values between their projection and attention, in one pass over them.

Queries and keys are normalised head by head (if the model does), then rotated to their positions (rotary position
embedding, Su et al., 2021, over the two halves of a head's first R features); keys and values are written to their
places in the paged cache.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """RMS normalisation of each query and each key head."""

    query: Tensor  # [D]: weights, in the dtype of the heads or float32
    key: Tensor  # [D]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Feature i of a head turns together with feature i + R/2, for i < R/2; the features from R on stay."""

    table: Tensor  # [P, R] float32: R/2 cosines, then R/2 sines of each position
    positions: Tensor  # [T] int64


class Qkv(Protocol):
    """T tokens, Hq query heads and Hk key-value heads of D features; P pages of S tokens."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: Tensor,
    ) -> None:
        """Normalise and rotate q [T, Hq, D] and k [T, Hk, D] in place; write k and v to k_pages, v_pages [P, S, Hk, D].

        q, k and v may be strided views with adjacent features; rows: [T] int64, page * S + offset of each token.
        Tokens that share a row (padding) may land in any order.
        """


QKV: Registry[OpQuery, Qkv] = Registry(
    "qkv",
    {
        "triton": "hornbeam.ops.qkv.triton:BACKEND",
        "native": "hornbeam.ops.qkv.native:BACKEND",
        "cpu": "hornbeam.ops.qkv.cpu:BACKEND",
        "reference": "hornbeam.ops.qkv.reference:BACKEND",
    },
)
