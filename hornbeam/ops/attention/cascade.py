"""Attention of decode rows over prefixes that they share, read once for all of them (cascade; Ye et al., 2024).

Rows of a prefix are put together to tiles; blocks of keys of all tiles, one after the other, are cut into equal strips,
as `balanced` does it with what is the rows' own, and which merges both by their log-sum-exps. The grid is fixed, so it
can be captured: which rows share what is read from lists on the device, which are the same until the rows change.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.attention.contract import AttentionShape
from hornbeam.ops.attention.paged_keys import BLOCK_KEYS, attend_keys, num_stages
from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2

_PROGRAMS = 2  # per multiprocessor
_BLOCK_QUERIES = 64  # packed queries of a tile: rows times the heads of a group
# Of the lists that `balanced` reads, too.
TILE_FIELDS: tl.constexpr = tl.constexpr(6)
SHARE_FIELDS: tl.constexpr = tl.constexpr(3)


# Lists begin within one buffer: specialised on alignment, the kernel would be compiled more than once.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["tiles_ptr", "strips_ptr", "members_ptr"])
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    parts_ptr,
    lse_ptr,
    page_tables_ptr,
    tiles_ptr,
    strips_ptr,
    members_ptr,
    q_stride,
    q_head_stride,
    page_table_stride,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One strip for one key-value head.

    Launched behind the kernel for the rows' own keys, which has waited for the queries before it lets this one begin,
    so that both can run at a time. Before it ends it waits for that one: whoever waits for it has waited for both.
    parts: [tiles + strips, NUM_KV_HEADS, BLOCK, HEAD_DIM] float32, lse: [tiles + strips, NUM_KV_HEADS, BLOCK] float32,
    base 2, by the sums of tile and strip.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    strip, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    position = strip * tl.load(strips_ptr)
    tile = tl.load(strips_ptr + 1 + 2 * strip)
    stop = tl.load(strips_ptr + 2 + 2 * strip)
    packed = tl.arange(0, BLOCK)
    place, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    dims = tl.arange(0, HEAD_DIM)
    while position < stop:
        begin = tl.load(tiles_ptr + TILE_FIELDS * tile)
        until = tl.minimum(stop, tl.load(tiles_ptr + TILE_FIELDS * tile + 1))
        num_keys = tl.load(tiles_ptr + TILE_FIELDS * tile + 2)
        slot = tl.load(tiles_ptr + TILE_FIELDS * tile + 3)
        first_member = tl.load(tiles_ptr + TILE_FIELDS * tile + 4)
        valid = place < tl.load(tiles_ptr + TILE_FIELDS * tile + 5)
        row = tl.load(members_ptr + first_member + place, mask=valid, other=0).to(tl.int64)
        q = tl.load(
            q_ptr + row[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        out, lse = attend_keys(
            q,
            k_ptr,
            v_ptr,
            page_tables_ptr + slot.to(tl.int64) * page_table_stride,
            kv_head,
            (position - begin) * BLOCK_KEYS,
            tl.minimum((until - begin) * BLOCK_KEYS, num_keys),
            packed,
            tl.full([BLOCK], -float("inf"), tl.float32),
            tl.zeros([BLOCK], tl.float32),
            scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            0,
            SOFT_CAP,
            False,
            BLOCK_KEYS,
        )
        part = ((tile + strip).to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK + packed
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], out, mask=valid[:, None])
        tl.store(lse_ptr + part, lse, mask=valid)
        tile += 1
        position = until
    if EARLY:
        tl.extra.cuda.gdc_wait()


class Cascade:
    """The lists of one lane, int32 on the device.

    tiles: [tiles, 6]: first block of keys and the one after the last, counted over all tiles; number of keys; the slot
    whose page table is read, which only the device knows; first member and number of rows.
    strips: blocks per strip; of each strip, its first tile, and the block where it stops (0: it is empty).
    shares: [B, 3], of each row: pages that it shares, its tile + 1 (0: none), its place in it.
    members: [B], rows in the order of the tiles.
    """

    def __init__(self, shape: AttentionShape, max_rows: int, num_processors: int) -> None:
        self._shape = shape
        self._group = shape.num_heads // shape.num_kv_heads
        self.block = max(_BLOCK_QUERIES, next_power_of_2(self._group))
        self._tile_rows = self.block // self._group
        self._num_strips = max(1, _PROGRAMS * num_processors // shape.num_kv_heads)
        self._shared: Sequence[SharedPrefix] = ()
        # A tile for every two rows, and one more for every full one.
        most_tiles = max_rows // 2 + max_rows // self._tile_rows
        self._sizes = (
            TILE_FIELDS.value * most_tiles,
            1 + 2 * self._num_strips,
            SHARE_FIELDS.value * max_rows,
            max_rows,
        )
        self._lists = torch.zeros(sum(self._sizes), dtype=torch.int32, device=shape.device)
        self.tiles, self.strips, self.shares, self._members = self._lists.split(self._sizes)
        parts = (most_tiles + self._num_strips, shape.num_kv_heads, self.block)
        self._parts = torch.empty((*parts, shape.head_dim), dtype=torch.float32, device=shape.device)
        self._lse = torch.empty(parts, dtype=torch.float32, device=shape.device)

    def plan(self, shared: Sequence[SharedPrefix]) -> None:
        """Bring the lists up to date. `shared` may be empty."""
        if shared == self._shared:
            return
        self._shared = shared
        lists = np.zeros(len(self._lists), dtype=np.int32)
        tiles, strips, shares, members = np.split(lists, np.cumsum(self._sizes)[:-1])
        tiles = tiles.reshape(-1, TILE_FIELDS.value)
        num_tiles = self._list_tiles(shared, tiles, shares.reshape(-1, SHARE_FIELDS.value), members)
        _cut(tiles[:num_tiles, 1], strips)
        host = torch.from_numpy(lists)
        self._lists.copy_(host.pin_memory() if self._lists.is_cuda else host, non_blocking=True)

    def _list_tiles(
        self, shared: Sequence[SharedPrefix], tiles: np.ndarray, shares: np.ndarray, members: np.ndarray
    ) -> int:
        num_tiles = num_members = num_blocks = 0
        for prefix in shared:
            for first in range(0, len(prefix.rows), self._tile_rows):
                rows = prefix.rows[first : first + self._tile_rows]
                end = num_blocks + -(-prefix.num_tokens // BLOCK_KEYS)
                tiles[num_tiles] = num_blocks, end, prefix.num_tokens, 0, num_members, len(rows)
                num_tiles += 1
                for place, row in enumerate(rows):
                    shares[row] = prefix.num_tokens // self._shape.page_size, num_tiles, place
                members[num_members : num_members + len(rows)] = rows
                num_members += len(rows)
                num_blocks = end
        return num_tiles

    def attend(
        self, page_tables: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows' queries [B, Hq, D] over the keys that they share: parts and lse (see the kernel), tiles, strips."""
        shape = self._shape
        _shared_kernel[(self._num_strips * shape.num_kv_heads,)](
            q,
            k_pages,
            v_pages,
            self._parts,
            self._lse,
            page_tables,
            self.tiles,
            self.strips,
            self._members,
            q.stride(0),
            q.stride(1),
            page_tables.stride(0),
            shape.scale,
            NUM_KV_HEADS=shape.num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=shape.head_dim,
            PAGE_SIZE=shape.page_size,
            SOFT_CAP=shape.soft_cap or 0.0,
            BLOCK=self.block,
            BLOCK_KEYS=BLOCK_KEYS,
            num_stages=num_stages(shape),
            **early_launch(shape.device),
        )
        return self._parts, self._lse, self.tiles, self.strips


def _cut(ends: np.ndarray, strips: np.ndarray) -> None:
    """Cut tiles that end at these blocks into strips, as `Cascade.strips` has them."""
    num_strips, num_blocks = len(strips) // 2, int(ends[-1]) if len(ends) else 0
    strips[0] = max(1, -(-num_blocks // num_strips))
    begins = np.arange(num_strips) * strips[0]
    strips[1::2] = np.searchsorted(ends, begins, side="right")
    strips[2::2] = np.where(begins < num_blocks, np.minimum(begins + strips[0], num_blocks), 0)
