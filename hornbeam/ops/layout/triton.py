"""The layout of a step's tokens by one program: it takes as long as a few trips to memory, one after the other."""

import triton
import triton.language as tl

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel
from hornbeam.ops.layout.contract import PlannedTokens, SlotTables, StepTokens
from hornbeam.ops.query import OpQuery

_BLOCK = 1024  # tokens at a time


_PLANNED = ["planned_slots_ptr", "planned_ids_ptr", "planned_positions_ptr", "entries_ptr", "pages_ptr"]


# The plan comes out of an upload at any offset: specialised on alignment, the kernel would be compiled many times.
@Kernel
@triton.jit(
    do_not_specialize=["num_decode", "num_planned", "num_tokens", "num_rows", "num_granted", "cache_rows_stride"],
    do_not_specialize_on_alignment=_PLANNED,
)
def _layout_kernel(
    planned_slots_ptr,
    planned_ids_ptr,
    planned_positions_ptr,
    entries_ptr,
    pages_ptr,
    lens_ptr,
    last_ids_ptr,
    page_tables_ptr,
    slots_ptr,
    ids_ptr,
    positions_ptr,
    cache_rows_ptr,
    decode_slots_ptr,
    decode_lens_ptr,
    num_decode,
    num_planned,
    num_tokens,
    num_rows,
    num_granted,
    cache_rows_stride,
    PADDING_SLOT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MAX_PAGES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens: those planned, then padding."""
    for first in range(0, num_granted, BLOCK):
        grants = first + tl.arange(0, BLOCK)
        granted = grants < num_granted
        entries = tl.load(entries_ptr + grants, mask=granted, other=0)
        pages = tl.load(pages_ptr + grants, mask=granted, other=0)
        tl.store(page_tables_ptr + entries, pages.to(tl.int32), mask=granted)
    tl.debug_barrier()  # pages are written before any token looks for its own
    for first in range(0, num_tokens, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        inside, planned, decodes = tokens < num_tokens, tokens < num_planned, tokens < num_decode
        prompt = planned & (tokens >= num_decode)
        slots = tl.load(planned_slots_ptr + tokens, mask=planned, other=PADDING_SLOT)
        following = tl.load(planned_slots_ptr + tokens + 1, mask=tokens + 1 < num_planned, other=-1)
        given_ids = tl.load(planned_ids_ptr + tokens - num_decode, mask=prompt, other=0)
        given_positions = tl.load(planned_positions_ptr + tokens - num_decode, mask=prompt, other=0)
        ids = tl.load(last_ids_ptr + slots, mask=decodes, other=0) + given_ids
        positions = tl.load(lens_ptr + slots, mask=decodes, other=0) + given_positions
        tl.store(slots_ptr + tokens, slots, mask=inside)
        tl.store(ids_ptr + tokens, ids, mask=inside)
        tl.store(positions_ptr + tokens, positions, mask=inside)
        for group in tl.static_range(NUM_GROUPS):
            table = page_tables_ptr + (group * (PADDING_SLOT + 1) + slots) * MAX_PAGES
            pages = tl.load(table + positions // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            cache_rows = pages * PAGE_SIZE + positions % PAGE_SIZE
            tl.store(cache_rows_ptr + group * cache_rows_stride + tokens, cache_rows, mask=inside)
        is_row = tokens < num_rows
        tl.store(decode_slots_ptr + tokens, tl.where(decodes, slots, PADDING_SLOT), mask=is_row)
        tl.store(decode_lens_ptr + tokens, tl.where(decodes, positions + 1, 1).to(tl.int32), mask=is_row)
        is_last = planned & (slots != following) & (slots != PADDING_SLOT)
        tl.store(lens_ptr + slots, positions + 1, mask=is_last)


class TritonLayout:
    """See `Layout`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def lay_out(self, planned: PlannedTokens, tables: SlotTables, out: StepTokens) -> None:
        """See `Layout`."""
        num_groups, num_slots, max_pages = tables.page_tables.shape
        assert len(out.decode_slots) <= len(out.slots)
        _layout_kernel[(1,)](
            planned.slots,
            planned.ids,
            planned.positions,
            planned.entries,
            planned.pages,
            tables.lens,
            tables.last_ids,
            tables.page_tables,
            out.slots,
            out.ids,
            out.positions,
            out.cache_rows,
            out.decode_slots,
            out.decode_lens,
            planned.num_decode,
            len(planned.slots),
            len(out.slots),
            len(out.decode_slots),
            len(planned.entries),
            out.cache_rows.stride(0),
            PADDING_SLOT=num_slots - 1,
            NUM_GROUPS=num_groups,
            MAX_PAGES=max_pages,
            PAGE_SIZE=tables.page_size,
            BLOCK=_BLOCK,
            num_warps=16,
        )


BACKEND = TritonLayout()
