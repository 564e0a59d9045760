"""A step's tokens, laid out on the device: what the plan says of them, completed by what only the device knows.

The host knows the ids and positions of prompts, and which slots decode; how long a slot is and which id it got last,
the device alone knows. S slots and one for padding, whose length stays 0; G cache groups with P pages per slot.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTables:
    """What the device knows of each slot; the last one is for padding."""

    lens: Tensor  # [S + 1] int64: tokens in the cache
    last_ids: Tensor  # [S + 1] int64
    page_tables: Tensor  # [G, S + 1, P] int32
    page_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTokens:
    """What the plan says: B rows that decode, then T tokens of chunks, and N pages that are granted. All int64."""

    num_decode: int  # B
    slots: Tensor  # [B + T]; tokens of one slot stand together
    ids: Tensor  # [T]
    positions: Tensor  # [T]
    entries: Tensor  # [N]: places in all page tables, one behind the other
    pages: Tensor  # [N]: what is written there


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """L >= B + T tokens, the last ones padding; and the first R >= B tokens as rows that decode, or else padding."""

    slots: Tensor  # [L] int64
    ids: Tensor  # [L] int64; 0 for padding
    positions: Tensor  # [L] int64; 0 for padding
    cache_rows: Tensor  # [G, L] int64: page * page size + offset, where what is cached of each token goes
    decode_slots: Tensor  # [R] int64
    decode_lens: Tensor  # [R] int32: after the step; 1 for padding

    def first(self, size: int, num_decode: int) -> "StepTokens":
        """The first `size` tokens and `num_decode` rows of these, in the same memory."""
        return StepTokens(
            slots=self.slots[:size],
            ids=self.ids[:size],
            positions=self.positions[:size],
            cache_rows=self.cache_rows[:, :size],
            decode_slots=self.decode_slots[:num_decode],
            decode_lens=self.decode_lens[:num_decode],
        )


class Layout(Protocol):
    """One pass over a step's tokens, before the model's."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def lay_out(self, planned: PlannedTokens, tables: SlotTables, out: StepTokens) -> None:
        """Write the granted pages into the page tables, the step's tokens to `out`, and the new lengths of slots."""


LAYOUT: Registry[OpQuery, Layout] = Registry(
    "layout",
    {"triton": "hornbeam.ops.layout.triton:BACKEND", "reference": "hornbeam.ops.layout.reference:BACKEND"},
)
