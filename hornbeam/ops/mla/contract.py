"""Multi-head latent attention (arXiv 2405.04434), in its absorbed form: all heads share one key, the cached row.

A row has C latent features, then R rotated ones. Keys are whole rows, values their first C features, so `Attend` of
`ops.attention` says what is computed: with one key-value head of C + R features, and `v_pages` the front of `k_pages`.
What is particular is how rows come to be, and that backends know that there is nothing else to read.
"""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.attention.contract import AttentionBackend
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery


class LatentRows(Protocol):
    """What happens to queries and rows between their projection and attention, in one pass over them."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def store(self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor) -> None:
        """Normalise the latents in place, rotate the ends of queries and rows in place, write the rows to the cache.

        q [T, Hq, C + R] and row [T, C + R] may be strided views with adjacent features; norm.weight: [C].
        rotation: of neighbours, unlike elsewhere: feature 2 i of the last R turns together with feature 2 i + 1.
        pages: [P, S, 1, C + R]; rows: [T] int64, page * S + offset of each token.
        """


LATENT_ROWS: Registry[OpQuery, LatentRows] = Registry("latent_rows", {"reference": "hornbeam.ops.mla.reference:ROWS"})
LATENT_ATTENTION: Registry[OpQuery, AttentionBackend] = Registry(
    "latent_attention", {"reference": "hornbeam.ops.mla.reference:ATTENTION"}
)
