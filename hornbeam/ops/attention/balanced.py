"""Decode attention in Triton, its work cut into equal strips.

Blocks of keys of all rows, one row after the other, are cut into as many strips as programs fit on the device, whatever
the lengths are: a strip may end one row, hold others whole and begin one more (as in stream-K products; Osama et al.,
2023). To a program they are one loop, so that the next row's keys are on their way while the last one ends. Rows that
are cut are merged by their log-sum-exps, along with what they have from prefixes that they share (`cascade`).

Which pages make a block is listed on the device, once a step, from the tables and lengths that are there. The grids
depend on the number of rows alone, so they can be captured.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.cascade import SHARE_FIELDS, TILE_FIELDS, Cascade
from hornbeam.ops.attention.contract import Attend, AttentionShape, Fresh, Rows
from hornbeam.ops.attention.merge import ROW_FIELDS, merge
from hornbeam.ops.attention.paged_keys import LOG2_E, to_base_2
from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2

_WARPS = 8  # per multiprocessor
_WARP_SUMS = 2048  # that a warp has registers for
_BLOCK_FEATURES = 4096  # of keys, and as many of values
_BLOCK_ROWS = 256  # for any number of rows up to it the kernel is the same
_LEAST_BLOCK = 8  # packed queries, the least that the matrix units take


# Slots come out of an upload at any offset, and lists begin within one buffer: specialised on alignment, the kernels
# would be compiled more than once.
@Kernel
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "slots_ptr",
        "shares_ptr",
        "tiles_ptr",
        "rows_ptr",
        "strips_ptr",
        "owners_ptr",
        "pieces_ptr",
    ],
)
def _list_kernel(
    page_tables_ptr,
    slots_ptr,
    lens_ptr,
    shares_ptr,
    tiles_ptr,
    rows_ptr,
    strips_ptr,
    owners_ptr,
    pieces_ptr,
    page_table_stride,
    num_rows,
    num_strips,
    NUM_QUERIES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List the blocks of one row.

    rows: [B, 5]: a row's first block and the one after its last; its first key and the one after the last; 0, or the
    tile that it shares keys with + 1. strips: blocks per strip; all blocks. owners: [blocks]: 2 * row, + 1 in the row's
    last block. pieces: [blocks, BLOCK_KEYS / PIECE]: 2 * the cell of a piece's first key + how many
    keys it has; cells are tokens of the cache, counted over all pages.
    """
    row = tl.program_id(0)
    all_rows = tl.arange(0, BLOCK_ROWS)
    lens = tl.load(lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
    first_keys = tl.zeros([BLOCK_ROWS], tl.int32)
    if WINDOW:
        first_keys = tl.maximum(lens - NUM_QUERIES - WINDOW + 1, 0) // PIECE * PIECE
    if HAS_SHARED:
        first_keys = tl.load(shares_ptr + SHARE_FIELDS * all_rows, mask=all_rows < num_rows, other=0) * PAGE_SIZE
    blocks_of = tl.cdiv(lens - first_keys, BLOCK_KEYS)
    begin = tl.sum(tl.where(all_rows < row, blocks_of, 0))
    num_blocks = tl.sum(tl.where(all_rows == row, blocks_of, 0))
    first_key = tl.sum(tl.where(all_rows == row, first_keys, 0))
    end_key = tl.load(lens_ptr + row)
    slot = tl.load(slots_ptr + row)
    tile = tl.load(shares_ptr + SHARE_FIELDS * row + 1) if HAS_SHARED else 0
    if HAS_SHARED:  # a tile reads the pages of its first row
        is_first = (tile > 0) & (tl.load(shares_ptr + SHARE_FIELDS * row + 2) == 0)
        tl.store(tiles_ptr + TILE_FIELDS * (tile - 1) + 3, slot.to(tl.int32), mask=is_first)
    tl.store(rows_ptr + ROW_FIELDS * row, begin)
    tl.store(rows_ptr + ROW_FIELDS * row + 1, begin + num_blocks)
    tl.store(rows_ptr + ROW_FIELDS * row + 2, first_key)
    tl.store(rows_ptr + ROW_FIELDS * row + 3, end_key)
    tl.store(rows_ptr + ROW_FIELDS * row + 4, tile)
    if row == 0:
        total = tl.sum(tl.where(all_rows < num_rows, blocks_of, 0))
        # The longest row, if it is alone, is cut so often that blocks of a strip and parts take the least time in all.
        least_len = (tl.sqrt(tl.max(blocks_of) / 6) + 0.5).to(tl.int32)
        tl.store(strips_ptr, tl.maximum(tl.maximum(tl.cdiv(total, num_strips), least_len), 1))
        tl.store(strips_ptr + 1, total)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        owner = 2 * row + tl.where(block == num_blocks - 1, 1, 0)
        tl.store(owners_ptr + begin + block, owner, mask=block < num_blocks)
    PIECES: tl.constexpr = BLOCK_KEYS // PIECE
    for start in range(0, num_blocks * PIECES, BLOCK):
        piece = start + tl.arange(0, BLOCK)
        key = first_key + piece * PIECE
        num_keys = tl.minimum(tl.maximum(end_key - key, 0), PIECE)
        table = page_tables_ptr + slot * page_table_stride
        page = tl.load(table + key // PAGE_SIZE, mask=num_keys > 0, other=0)
        listed = 2 * (page * PAGE_SIZE + key % PAGE_SIZE) + num_keys
        tl.store(pieces_ptr + begin * PIECES + piece, listed, mask=piece < num_blocks * PIECES)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "strips_ptr", "owners_ptr", "pieces_ptr"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    parts_ptr,
    lse_ptr,
    rows_ptr,
    strips_ptr,
    owners_ptr,
    pieces_ptr,
    sinks_ptr,
    q_stride,
    q_head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One strip for one key-value head. Heads of one strip are neighbours in the grid, as they are in the pages.

    Products have keys or features first and queries second, of which eight are enough for the matrix units.

    A row that lies in the strip goes to `out` [T, NUM_HEADS, HEAD_DIM], what there is of others to parts
    [B + strips, NUM_KV_HEADS, queries and heads, HEAD_DIM] float32 and their lse, base 2: row and strip add up to an
    index of its own, since from part to part one of them goes up, or both.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PACKED: tl.constexpr = NUM_QUERIES * GROUP
    strip, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    strip_len = tl.load(strips_ptr)
    start = strip * strip_len
    stop = tl.minimum(start + strip_len, tl.load(strips_ptr + 1))
    packed = tl.arange(0, BLOCK)
    query, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    valid = packed < PACKED
    dims = tl.arange(0, HEAD_DIM)
    keys = tl.arange(0, BLOCK_KEYS)
    no_maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    no_total = tl.zeros([BLOCK], tl.float32)
    if HAS_SINKS:  # as if there had been a key with that score and a value of zeros
        no_maximum = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        no_total += 1.0
    maximum, total = no_maximum, no_total
    if HAS_SINKS:
        first = tl.load(owners_ptr + start, mask=start < stop, other=0) // 2
        if tl.load(rows_ptr + ROW_FIELDS * first) < start:  # a strip before has the sink
            maximum = tl.full([BLOCK], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([HEAD_DIM, BLOCK], tl.float32)
    for block in tl.range(start, stop, num_stages=STAGES):
        piece = tl.load(pieces_ptr + block * (BLOCK_KEYS // PIECE) + keys // PIECE)
        inside = (keys % PIECE < piece % (2 * PIECE))[:, None]
        cell = piece // (2 * PIECE) * PIECE + keys % PIECE
        cell = (cell.to(tl.int64) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        owners = tl.load(owners_ptr + block + packed * 0)  # the same number each: so it is loaded ahead, like keys
        tokens = (owners // 2 * NUM_QUERIES + query).to(tl.int64)
        q = tl.load(
            q_ptr + tokens[None, :] * q_stride + head[None, :] * q_head_stride + dims[:, None],
            mask=valid[None, :],
            other=0.0,
        )
        k = tl.load(k_ptr + cell[:, None] + dims[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + cell[None, :] + dims[:, None], mask=tl.trans(inside), other=0.0)
        owner = tl.load(owners_ptr + block)
        row = owner // 2
        row_ptr = rows_ptr + ROW_FIELDS * row
        seen = inside
        if WINDOW or NUM_QUERIES > 1:
            positions = (tl.load(row_ptr + 2) + (block - tl.load(row_ptr)) * BLOCK_KEYS + keys)[:, None]
            query_positions = (tl.load(row_ptr + 3) - NUM_QUERIES + query)[None, :]
            seen = seen & (positions <= query_positions)
            if WINDOW:
                seen = seen & (positions > query_positions - WINDOW)
        scores = to_base_2(tl.dot(k, q, input_precision="ieee"), scale, SOFT_CAP)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 0))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - reference[None, :])
        decay = tl.exp2(maximum - reference)
        accumulator = accumulator * decay[None, :] + tl.dot(v, weights.to(v.dtype), input_precision="ieee")
        total = total * decay + tl.sum(weights, 0)
        maximum = higher
        closes = owner % 2 == 1
        if closes | (block == stop - 1):
            divisor = tl.where(total == 0, 1.0, total)
            out = accumulator / divisor[None, :]
            if closes & (tl.load(row_ptr) >= start) & (tl.load(row_ptr + 4) == 0):
                index = (row * NUM_QUERIES + query).to(tl.int64) * NUM_HEADS + head
                to = out_ptr + index[None, :] * HEAD_DIM + dims[:, None]
                tl.store(to, out.to(out_ptr.dtype.element_ty), mask=valid[None, :])
            else:
                part = ((row + strip).to(tl.int64) * NUM_KV_HEADS + kv_head) * PACKED + packed
                tl.store(parts_ptr + part[None, :] * HEAD_DIM + dims[:, None], out, mask=valid[None, :])
                tl.store(lse_ptr + part, maximum + tl.log2(divisor), mask=valid)
            maximum, total = no_maximum, no_total
            accumulator = tl.zeros([HEAD_DIM, BLOCK], tl.float32)


class BalancedDecode:
    """The lists of one lane: made on the device when a step is planned, read by all of its layers."""

    def __init__(self, shape: AttentionShape, max_rows: int, num_processors: int) -> None:
        self._shape = shape
        self._max_rows = max_rows
        self._num_processors = num_processors
        self._block_keys = min(max(_BLOCK_FEATURES // shape.head_dim, 16), 64)
        num_programs = max(1, _WARPS // self._num_warps(shape.num_heads // shape.num_kv_heads)) * num_processors
        self._num_strips = max(1, num_programs // shape.num_kv_heads)
        self._piece = math.gcd(shape.page_size, self._block_keys)
        # What lies before a window's first key in its piece may make a block more.
        most_blocks = max_rows * (-(-shape.max_pages * shape.page_size // self._block_keys) + 1)
        sizes = (ROW_FIELDS.value * max_rows, 2, most_blocks, most_blocks * (self._block_keys // self._piece))
        lists = torch.zeros(sum(sizes), dtype=torch.int32, device=shape.device).split(sizes)
        self._rows, self._strips, self._owners, self._pieces = lists
        self._cascade: Cascade | None = None  # made when it is first needed
        self._attends: dict[tuple[int, bool], Attend] = {}  # by queries per row, and whether prefixes are shared

    def _num_warps(self, packed: int) -> int:
        """Of one block: few, which then need not wait for one another, but with registers for their sums."""
        shape = self._shape
        return shape.dtype.itemsize // 2 * math.ceil(shape.head_dim * _block(packed) / _WARP_SUMS)

    def plan(self, rows: Rows) -> Attend:
        """List the work of a step. Rows have the same number of queries; with `rows.shared`, one."""
        shape, num_rows, num_queries = self._shape, len(rows.query_lens), rows.query_lens[0]
        assert all(length == num_queries for length in rows.query_lens)
        if rows.shared is not None:
            assert num_queries == 1
            assert shape.window is None
            self._cascade = self._cascade or Cascade(shape, self._max_rows, self._num_processors)
            self._cascade.plan(rows.shared)
        cascade = None if rows.shared is None else self._cascade
        _list_kernel[(num_rows,)](
            rows.page_tables,
            rows.slots,
            rows.lens,
            self._rows if cascade is None else cascade.shares,
            self._rows if cascade is None else cascade.tiles,
            self._rows,
            self._strips,
            self._owners,
            self._pieces,
            rows.page_tables.stride(0),
            num_rows,
            self._num_strips,
            NUM_QUERIES=num_queries,
            PAGE_SIZE=shape.page_size,
            WINDOW=shape.window or 0,
            HAS_SHARED=cascade is not None,
            PIECE=self._piece,
            BLOCK_KEYS=self._block_keys,
            BLOCK_ROWS=max(_BLOCK_ROWS, next_power_of_2(self._max_rows)),
            BLOCK=512,
        )
        key = num_queries, cascade is not None
        if key not in self._attends:
            self._attends[key] = partial(self._attend, num_queries, rows.page_tables, cascade)
        return self._attends[key]

    def _attend(
        self,
        num_queries: int,
        page_tables: Tensor,
        cascade: Cascade | None,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert q.stride(2) == 1
        shape, num_rows = self._shape, len(q) // num_queries
        packed = num_queries * shape.num_heads // shape.num_kv_heads
        out = q.new_empty(q.shape) if out is None else out
        sizes = num_rows + self._num_strips, shape.num_kv_heads, packed
        lse = torch.empty(sizes, dtype=torch.float32, device=q.device)
        parts = torch.empty((*sizes, shape.head_dim), dtype=torch.float32, device=q.device)
        _decode_kernel[(self._num_strips * shape.num_kv_heads,)](
            q,
            k_pages,
            v_pages,
            out,
            parts,
            lse,
            self._rows,
            self._strips,
            self._owners,
            self._pieces,
            q if sinks is None else sinks,
            q.stride(0),
            q.stride(1),
            shape.scale,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            NUM_QUERIES=num_queries,
            WINDOW=shape.window or 0,
            SOFT_CAP=shape.soft_cap or 0.0,
            HAS_SINKS=sinks is not None,
            PIECE=self._piece,
            BLOCK=_block(packed),
            BLOCK_KEYS=self._block_keys,
            STAGES=4 if shape.dtype.itemsize == 2 else 1,  # keys and values of each stage wait in shared memory
            num_warps=self._num_warps(packed),
            **early_launch(shape.device),
        )
        shared = None if cascade is None else (cascade.attend(page_tables, q, k_pages, v_pages), cascade.shares)
        merge(out, (parts, lse, self._rows, self._strips), num_queries, shared)
        return out


def _block(packed: int) -> int:
    return max(_LEAST_BLOCK, next_power_of_2(packed))
