"""Multi-head latent attention (arXiv 2405.04434): the cache holds one row per token, of which all heads make their own.

Sizes, of `LatentSizes`: a row has C latent features, then R rotated ones. A head's query has N features, then R rotated
ones; its key is N products of the latent, then the row's rotated part; its value is V products of the latent. These
products are the rows of `up` [Hq, N + V, C]. There are two ways to compute the same:

absorbed: queries are multiplied by the keys' rows of `up` and so become C + R wide; all heads then attend to the cached
rows as they are, and what they gather of latents is multiplied by the values' rows of `up`.
expanded: keys and values of each head are made of the rows, and attention is ordinary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.attention.contract import AttentionBackend
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery


class LatentRows(Protocol):
    """What happens to queries and rows between their projection and attention.

    q [T, Hq, N + R] and row [T, C + R] may be strided views with adjacent features; norm.weight: [C].
    rotation: of neighbours, unlike elsewhere: feature 2 i of the last R turns together with feature 2 i + 1.
    pages: [P, S, 1, C + R]; rows: [T] int64, page * S + offset of each token.
    """

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def store(self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor) -> None:
        """Normalise the latents in place, rotate the ends of queries and rows in place, write the rows to the cache."""

    def absorb(
        self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor, up: Tensor
    ) -> Tensor:
        """The same, and the queries as absorbed attention takes them [T, Hq, C + R]; q and row are spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Queries of some rows, one row after the other, and keys of the same rows: of a row there may be none."""

    query_lens: Sequence[int]
    key_lens: Sequence[int]
    causal: bool  # the last query of a row sees all its keys, the one before all but the last ...; else each sees all


class RaggedAttend(Protocol):
    """Attention over a planned stretch."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, Hq, N + R], k [keys, Hq, N + R], v [keys, Hq, V] -> [T, Hq, V], and log-sum-exps [T, Hq].

        Log-sum-exps are float32 to base 2, and those of queries without keys -inf.
        """


class Ragged(Protocol):
    """Ordinary attention over keys and values that are not in pages; one instance per lane."""

    def plan(self, stretches: Sequence[Stretch]) -> Sequence[RaggedAttend]:
        """For all stretches of a step. What was planned before is void."""

    def merge(self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        """Add `other` [T, Hq, V], attention of the same queries over other keys, to `out`, in place; `lse` likewise."""


_FLASHINFER = "hornbeam.ops.mla.flashinfer:BACKEND"
_TRITON = "hornbeam.ops.mla.triton:BACKEND"
_REFERENCE = "hornbeam.ops.mla.reference:ATTENTION"

LATENT_ROWS: Registry[OpQuery, LatentRows] = Registry(
    "latent_rows", {"triton": "hornbeam.ops.mla.triton_rows:ROWS", "reference": "hornbeam.ops.mla.reference:ROWS"}
)

# The orders are those of measurements on an H200 (bfloat16, rows of 512 + 64 features). Decode of one row over 300
# tokens, values included, takes 8.9 us in Triton and 12.7 in FlashInfer with 16 heads, 15 and 18 with 128; 256 rows of
# 800 take 84 and 77 us with 16 heads, 300 and 156 with 128. Two prompts of 4,096 tokens take 650 and 350 us, expanded.
SINGLE_LATENT_ATTENTION: Registry[OpQuery, AttentionBackend] = Registry(
    "single_latent_attention", {"triton": _TRITON, "flashinfer": _FLASHINFER, "reference": _REFERENCE}
)
LATENT_ATTENTION: Registry[OpQuery, AttentionBackend] = Registry(
    "latent_attention", {"flashinfer": _FLASHINFER, "triton": _TRITON, "reference": _REFERENCE}
)
