"""Attention of a step's queries over the paged cache: what is planned once a step, and what runs in every layer.

B rows (requests), T query tokens, Hq query heads, Hk key-value heads of D features, pages of S tokens.
Queries of row i are the last ones of its sequence: the query at distance j from the row's end sees all but the
last j tokens (causal). Keys and values of the whole step are written before any of it attends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hornbeam.core.family import LatentSizes
from hornbeam.core.plan import SharedPrefix
from hornbeam.core.registry import Registry
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What is fixed for the life of a backend, for one cache group of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int  # entries of a page table
    scale: float  # of the dot products
    window: int | None = None  # a query sees only the last so many tokens, itself included; nothing behind is read
    soft_cap: float | None = None  # c: scores x become c * tanh(x / c)
    latent: LatentSizes | None = None  # the one key-value head is the latent's row, of `head_dim` features
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Who attends: on the device exactly, on the host as upper bounds (equal, unless drafts were rejected)."""

    page_tables: Tensor  # [num_slots + 1, max_pages] int32, of all slots
    slots: Tensor  # [B] int64
    lens: Tensor  # [B] int32: tokens in the cache, those of this step included
    len_bounds: Sequence[int]  # B upper bounds of `lens`
    query_lens: Sequence[int]  # B: queries of each row; for decode all the same
    # Prefixes to be read once, for backends that can, by rows with one query each; None: each row reads all of its own.
    shared: Sequence[SharedPrefix] | None = None
    fresh: bool = False  # `attend` gets the keys and values of the queries' own tokens, too
    captured: bool = False  # `attend` runs inside a graph: its addresses must stay the same


Fresh = tuple[Tensor, Tensor]  # k and v [T, Hk, D]: what the step has written for the queries' own tokens


class Attend(Protocol):
    """A planned attention; valid until the same lane plans again."""

    def __call__(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq, D] over k_pages and v_pages [P, S, Hk, D] -> [T, Hq, D].

        sinks: [Hq], of a model that has them (`OpQuery.sinks`): a score of each head that takes its part of the
        softmax, and adds nothing to the sum. fresh: needed if `Rows.fresh` was set. out: [T, Hq, D], contiguous, where
        the result goes; None: into new memory.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StoringAttend:
    """An `Attend` that can also do what stands ahead of it, for steps that have nothing but its queries.

    run(q, k, v, norms, rotation, cells, k_pages, v_pages, sinks) is `Qkv.store` with these arguments (but that q and k
    stay as they are), and then the attention. rotation: of all features of a head, or None.
    """

    attend: Attend
    run: Callable[
        [Tensor, Tensor, Tensor, HeadNorms | None, Rotation | None, Tensor, Tensor, Tensor, Tensor | None], Tensor
    ]

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        """See `Attend`."""
        return self.attend(*arguments, **named)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttend:
    """A planned latent attention, valid as long as an `Attend`. Sizes are those of `ops.mla.contract`.

    run(q, row, pages, up): q [T, Hq, C + R] if absorbed, else [T, Hq, N + R], over pages [P, S, 1, C + R] ->
    [T, Hq, V]. row: [T, C + R], what the step has written for the queries' own tokens; up: [Hq, N + V, C].
    """

    absorbed: bool  # whether queries come multiplied by the rows of `up` that make keys
    run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """One instance per lane: two steps may be under way, and one's plan must not overwrite the other's."""

    def plan_decode(self, rows: Rows) -> Attend | LatentAttend:
        """For rows with one query each (or the same small number). Does not wait for the device; what it
        enqueues there runs once, ahead of all layers.

        With `rows.captured`, the result for a given B and given tensors in `rows` is always the same, over the same
        addresses; what these tensors hold when the graph is replayed is what counts. Rows may then be empty: they
        have a length of 0, but a bound of 1, and their part of `out` stays as it is.
        """

    def plan_prefill(self, rows: Rows) -> Attend | LatentAttend:
        """For rows with any numbers of queries.

        With `rows.captured`, if the backend `captures_prefill`: as above, for a given sum of `query_lens`, the same B
        and without `fresh`. Rows may then be empty: queries of a row with a bound of 0 get zeros.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAttention:
    """The attention of one cache group in one lane; each may be done by another backend."""

    single: Attention  # decode of one row alone
    decode: Attention
    prefill: Attention


class AttentionBackend(Protocol):
    """A registry entry: says what it can do and makes instances."""

    captures: bool  # decode can run inside a device graph
    captures_prefill: bool  # prefill, too
    least_shared: int | None  # tokens that shared prefixes must save per step to pay; None: cannot share

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """An instance for one lane. `max_rows`: the most rows that one plan will hold."""


_FLASHINFER = "hornbeam.ops.attention.flashinfer:BACKEND"
_TRITON = "hornbeam.ops.attention.triton:BACKEND"
_NATIVE = "hornbeam.ops.attention.native:BACKEND"
_CPU = "hornbeam.ops.attention.cpu:BACKEND"
_REFERENCE = "hornbeam.ops.attention.reference:BACKEND"

# The orders are those of measurements on an H200 (32 query and 8 key-value heads of 128, bfloat16). Decode takes in
# Triton and in FlashInfer, in microseconds: 4 rows of 640 tokens 9.2 and 12.5, 64 rows 47 and 55, 256 rows 170 and 180;
# 64 rows of 100 to 2,000 tokens 74 and 85. Prefill of two prompts of 4,096 tokens takes 0.45 ms in FlashInfer and 1.0
# in Triton. On CPUs, kernels of our own need no gathered copies of pages and few calls.
DECODE_ATTENTION: Registry[OpQuery, AttentionBackend] = Registry(
    "decode_attention",
    {"triton": _TRITON, "flashinfer": _FLASHINFER, "native": _NATIVE, "cpu": _CPU, "reference": _REFERENCE},
)
PREFILL_ATTENTION: Registry[OpQuery, AttentionBackend] = Registry(
    "prefill_attention",
    {"flashinfer": _FLASHINFER, "triton": _TRITON, "native": _NATIVE, "cpu": _CPU, "reference": _REFERENCE},
)
