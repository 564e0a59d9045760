"""Page tables as one list of all rows' pages (compressed sparse rows), as planning libraries want them.

The host knows upper bounds of lengths, and with them where each row's pages begin; which pages these are, and how full
the last one is, comes from the device's own tables and lengths, by a kernel.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.contract import AttentionShape, Rows
from hornbeam.ops.launch import Kernel


# Slots come out of an upload at any offset: specialised on alignment, the kernel would be compiled twice.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _fill_kernel(
    page_tables_ptr,
    slots_ptr,
    lens_ptr,
    indptr_ptr,
    indices_ptr,
    last_page_lens_ptr,
    skips_ptr,
    skip_stride,
    page_table_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy a row's page numbers, but for the first ones, to its place among all rows', and tell how many tokens its
    last page holds."""
    row = tl.program_id(0)
    begin = tl.load(indptr_ptr + row)
    num_pages = tl.load(indptr_ptr + row + 1) - begin
    skip = tl.load(skips_ptr + row * skip_stride)
    table = page_tables_ptr + tl.load(slots_ptr + row) * page_table_stride + skip
    for first in range(0, num_pages, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        inside = entries < num_pages
        tl.store(indices_ptr + begin + entries, tl.load(table + entries, mask=inside), mask=inside)
    tl.store(last_page_lens_ptr + row, tl.load(lens_ptr + row) - (skip + num_pages - 1) * PAGE_SIZE)


class PageLists:
    """The pages of each row, one row after the other, as FlashInfer wants them. Owns the device buffers."""

    def __init__(self, shape: AttentionShape, max_rows: int) -> None:
        self._shape = shape
        self.indptr = torch.zeros(max_rows + 1, dtype=torch.int32, device=shape.device)
        self.indices = torch.zeros(max_rows * shape.max_pages, dtype=torch.int32, device=shape.device)
        self._no_skips = torch.zeros(1, dtype=torch.int32, device=shape.device)
        self.last_page_lens = torch.ones(max_rows, dtype=torch.int32, device=shape.device)

    def bounds(self, len_bounds: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Where each row's pages begin [B + 1], and how many tokens its last page holds [B]: on the host."""
        lens = np.array(len_bounds, dtype=np.int32)
        num_pages = -(-lens // self._shape.page_size)
        indptr = np.zeros(len(lens) + 1, dtype=np.int32)
        num_pages.cumsum(out=indptr[1:])
        return torch.from_numpy(indptr), torch.from_numpy(lens - (num_pages - 1) * self._shape.page_size)

    def window(self, rows: Rows) -> tuple[np.ndarray, Tensor]:
        """Without the pages that lie behind the window of a row's first query: bounds of lengths [B], and the numbers
        of these pages [B] int32, on the device."""
        assert self._shape.window is not None
        lens = np.array(rows.len_bounds, dtype=np.int32)
        first_seen = lens - np.array(rows.query_lens, dtype=np.int32) - self._shape.window + 1
        skips = np.maximum(first_seen, 0) // self._shape.page_size
        on_device = torch.from_numpy(skips).to(self._shape.device, non_blocking=True)
        return lens - skips * self._shape.page_size, on_device

    def fill(self, rows: Rows, skips: Tensor | None = None) -> None:
        """Bring the buffers up to date with the device's page tables and lengths; `indptr` is there already.

        skips: [B] int32, first pages of each row that are left out; None for none.
        """
        skip_stride = 0 if skips is None else skips.stride(0)
        _fill_kernel[(len(rows.slots),)](
            rows.page_tables,
            rows.slots,
            rows.lens,
            self.indptr,
            self.indices,
            self.last_page_lens,
            self._no_skips if skips is None else skips,
            skip_stride,
            rows.page_tables.stride(0),
            PAGE_SIZE=self._shape.page_size,
            BLOCK=128,
        )
