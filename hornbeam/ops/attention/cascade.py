"""Attention of decode rows over prefixes that they share, read once for all of them (cascade; Ye et al., 2024).

A row's keys are split in two: the shared prefix, and what is the row's own. Another backend attends to its own part and
tells the log-sum-exps; here the shared parts are done, several rows to a tile, and the parts are merged by their
log-sum-exps. A tile's keys are split over several programs where that fills the device. The grids depend on the number
of rows alone, so they can be captured: which rows share what is read from a work list on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.attention.contract import AttentionShape, Rows
from hornbeam.ops.launch import early_launch

_BLOCK_KEYS = 64
_BLOCK_QUERIES = 64  # packed queries of a tile: rows times the heads of a group
_LEAST_KEYS = 256  # of an item, unless the prefix is shorter
_ITEM_FIELDS = 5
_ROW_FIELDS = 4


@triton.jit
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    parts_ptr,
    lse_ptr,
    page_tables_ptr,
    slots_ptr,
    items_ptr,
    members_ptr,
    q_stride,
    q_head_stride,
    page_table_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One item of the work list for one key-value head: some rows, a stretch of the keys that they share.

    parts: [items, NUM_KV_HEADS, BLOCK, HEAD_DIM] float32; lse: [items, NUM_KV_HEADS, BLOCK] float32, base 2.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    item, kv_head = tl.program_id(0), tl.program_id(1)
    first_member = tl.load(items_ptr + 5 * item)
    num_rows = tl.load(items_ptr + 5 * item + 1)
    start = tl.load(items_ptr + 5 * item + 2)
    end = tl.load(items_ptr + 5 * item + 3)
    table_row = tl.load(items_ptr + 5 * item + 4)
    if num_rows > 0:
        packed = tl.arange(0, BLOCK)
        member, head = packed // GROUP, kv_head * GROUP + packed % GROUP
        valid = member < num_rows
        row = tl.load(members_ptr + first_member + member, mask=valid, other=0).to(tl.int64)
        dims = tl.arange(0, HEAD_DIM)
        q = tl.load(
            q_ptr + row[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        table = page_tables_ptr + tl.load(slots_ptr + table_row) * page_table_stride
        maximum = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        accumulator = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        for block in range(start, end, BLOCK_KEYS):
            keys = block + tl.arange(0, BLOCK_KEYS)
            inside = keys < end
            page = tl.load(table + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            cell = ((page * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
            k = tl.load(k_ptr + cell[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)  # to base 2
            scores = tl.where(inside[None, :], scores, -float("inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            decay = tl.exp2(maximum - higher)
            v = tl.load(v_ptr + cell[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
            accumulator = accumulator * decay[:, None]
            accumulator += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * decay + tl.sum(weights, 1)
            maximum = higher
        part = (item * NUM_KV_HEADS + kv_head) * BLOCK + packed
        out = accumulator / total[:, None]
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], out, mask=valid[:, None])
        tl.store(lse_ptr + part, maximum + tl.log2(total), mask=valid)


@triton.jit
def _merge_kernel(
    out_ptr,
    own_lse_ptr,
    parts_ptr,
    lse_ptr,
    rows_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the shared parts of one row's heads of one key-value head to its own part, in place.

    out: [B, Hq, HEAD_DIM]; own_lse: [B, Hq] float32, base 2.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_item = tl.load(rows_ptr + 4 * row + 1)
    num_items = tl.load(rows_ptr + 4 * row + 2)
    place = tl.load(rows_ptr + 4 * row + 3)
    if num_items > 0:
        heads = tl.arange(0, GROUP_BLOCK)
        dims = tl.arange(0, HEAD_DIM)
        inside = heads < GROUP
        index = (row * NUM_KV_HEADS + kv_head) * GROUP + heads
        out = tl.load(out_ptr + index[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0)
        maximum = tl.load(own_lse_ptr + index, mask=inside, other=0.0)
        merged = out.to(tl.float32)
        total = tl.full([GROUP_BLOCK], 1.0, tl.float32)
        for item in range(first_item, first_item + num_items):
            part = (item * NUM_KV_HEADS + kv_head) * BLOCK + place * GROUP + heads
            lse = tl.load(lse_ptr + part, mask=inside, other=0.0)
            shared = tl.load(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0)
            higher = tl.maximum(maximum, lse)
            decay, weight = tl.exp2(maximum - higher), tl.exp2(lse - higher)
            merged = merged * decay[:, None] + shared * weight[:, None]
            total = total * decay + weight
            maximum = higher
        merged /= total[:, None]
        tl.store(out_ptr + index[:, None] * HEAD_DIM + dims[None, :], merged.to(out.dtype), mask=inside[:, None])


class Cascade:
    """The work lists of one lane and the buffers of its parts."""

    def __init__(self, shape: AttentionShape, max_rows: int, num_programs: int) -> None:
        """`num_programs`: that fill the device."""
        self._shape = shape
        self._group = shape.num_heads // shape.num_kv_heads
        self._block = max(_BLOCK_QUERIES, triton.next_power_of_2(self._group))
        self._tile_rows = self._block // self._group
        self._num_splits = max(1, num_programs // shape.num_kv_heads)  # beyond one per tile
        self._max_rows = max_rows
        max_items = self._num_items(max_rows)
        self._shared: Sequence[SharedPrefix] = ()
        # [items, 5]: first member, rows, first and end token, the row whose page table is read.
        # [B, 4]: pages that a row shares, its first item, its items, its place among their rows.
        # [B]: members, rows in the order of the groups.
        sizes = (_ITEM_FIELDS * max_items, _ROW_FIELDS * max_rows, max_rows)
        self._lists = torch.zeros(sum(sizes), dtype=torch.int32, device=shape.device)
        self._items, self._rows, self._members = self._lists.split(sizes)
        self.skips = self._rows[::_ROW_FIELDS]  # [B] int32: pages that each row shares
        parts = (max_items, shape.num_kv_heads, self._block)
        self._parts = torch.empty((*parts, shape.head_dim), dtype=torch.float32, device=shape.device)
        self._lse = torch.empty(parts, dtype=torch.float32, device=shape.device)

    def _num_items(self, num_rows: int) -> int:
        """The most items of so many rows: a tile for every two, one more for every full one, and the splits."""
        num_tiles: int = num_rows // 2 + num_rows // self._tile_rows
        return num_tiles + self._num_splits

    def plan(self, shared: Sequence[SharedPrefix]) -> None:
        """Bring the work list up to date. `shared` may be empty."""
        if shared == self._shared:
            return
        self._shared = shared
        lists = np.zeros(len(self._lists), dtype=np.int32)
        items, rows, members = np.split(lists, np.cumsum((len(self._items), len(self._rows))))
        self._list(shared, items.reshape(-1, _ITEM_FIELDS), rows.reshape(-1, _ROW_FIELDS), members)
        host = torch.from_numpy(lists)
        self._lists.copy_(host.pin_memory() if self._lists.is_cuda else host, non_blocking=True)

    def own_lens(self, len_bounds: Sequence[int]) -> np.ndarray:
        """[B] int32: of each row's tokens, those that it does not share."""
        lens = np.array(len_bounds, dtype=np.int32)
        for prefix in self._shared:
            lens[list(prefix.rows)] -= prefix.num_tokens
        return lens

    def _list(self, shared: Sequence[SharedPrefix], items: np.ndarray, rows: np.ndarray, members: np.ndarray) -> None:
        tiles = [
            (prefix, prefix.rows[first : first + self._tile_rows])
            for prefix in shared
            for first in range(0, len(prefix.rows), self._tile_rows)
        ]
        num_tokens = sum(prefix.num_tokens for prefix, _ in tiles)
        share = triton.cdiv(num_tokens, self._num_splits)
        stretch = max(_LEAST_KEYS, triton.cdiv(share, _BLOCK_KEYS) * _BLOCK_KEYS)
        num_members = num_items = 0
        for prefix, tile in tiles:
            splits = range(0, prefix.num_tokens, stretch)
            for item, start in enumerate(splits, start=num_items):
                end = min(start + stretch, prefix.num_tokens)
                items[item] = num_members, len(tile), start, end, tile[0]
            for place, row in enumerate(tile):
                rows[row] = prefix.num_tokens // self._shape.page_size, num_items, len(splits), place
            members[num_members : num_members + len(tile)] = tile
            num_members += len(tile)
            num_items += len(splits)

    def attend(self, rows: Rows, q: Tensor, k_pages: Tensor, v_pages: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
        """Merge the attention over shared prefixes into `own` [B, Hq, D], with `own_lse` [B, Hq] float32, base 2."""
        shape, num_rows = self._shape, len(rows.slots)
        assert own.is_contiguous()
        assert own_lse.is_contiguous()
        early = early_launch(shape.device)
        _shared_kernel[(self._num_items(num_rows), shape.num_kv_heads)](
            q,
            k_pages,
            v_pages,
            self._parts,
            self._lse,
            rows.page_tables,
            rows.slots,
            self._items,
            self._members,
            q.stride(0),
            q.stride(1),
            rows.page_tables.stride(0),
            shape.scale,
            NUM_KV_HEADS=shape.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=shape.head_dim,
            PAGE_SIZE=shape.page_size,
            BLOCK=self._block,
            BLOCK_KEYS=_BLOCK_KEYS,
            num_stages=3 if shape.dtype.itemsize == 2 else 1,
            **early,
        )
        _merge_kernel[(num_rows, shape.num_kv_heads)](
            own,
            own_lse,
            self._parts,
            self._lse,
            self._rows,
            NUM_KV_HEADS=shape.num_kv_heads,
            GROUP=self._group,
            GROUP_BLOCK=triton.next_power_of_2(self._group),
            HEAD_DIM=shape.head_dim,
            BLOCK=self._block,
            num_warps=2,
            **early,
        )
        return own
