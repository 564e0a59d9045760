"""The layout of a step's tokens in plain torch."""

import torch

from hornbeam.ops.layout.contract import PlannedTokens, SlotTables, StepTokens
from hornbeam.ops.query import OpQuery


class ReferenceLayout:
    """Serves every device."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def lay_out(self, planned: PlannedTokens, tables: SlotTables, out: StepTokens) -> None:
        """See `Layout`."""
        num_decode, num_tokens = planned.num_decode, len(planned.slots)
        padding_slot, page_size = len(tables.lens) - 1, tables.page_size
        if len(planned.entries):
            tables.page_tables.view(-1)[planned.entries] = planned.pages.int()

        decode_slots = planned.slots[:num_decode]
        out.slots[:num_tokens] = planned.slots
        out.slots[num_tokens:] = padding_slot
        for values, known, given in (
            (out.ids, tables.last_ids, planned.ids),
            (out.positions, tables.lens, planned.positions),
        ):
            values[:num_decode] = known[decode_slots]
            values[num_decode:num_tokens] = given
            values[num_tokens:] = 0
        pages = tables.page_tables[:, out.slots, out.positions // page_size]
        torch.add(pages.long() * page_size, out.positions % page_size, out=out.cache_rows)
        out.decode_slots[:num_decode] = decode_slots
        out.decode_slots[num_decode:] = padding_slot
        out.decode_lens[:num_decode] = out.positions[:num_decode] + 1
        out.decode_lens[num_decode:] = 1

        # Within a step lengths only grow, so that a slot's is what its last token says.
        tables.lens.scatter_reduce_(0, planned.slots, out.positions[:num_tokens] + 1, "amax")
        tables.lens[padding_slot] = 0


BACKEND = ReferenceLayout()
