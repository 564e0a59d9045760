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
from hornbeam.ops.attention.paged_keys import BLOCK_KEYS, LOG2_E, add_block, finish
from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2

_PROGRAMS = 4  # per multiprocessor
_BLOCK_ROWS = 256  # for any number of rows up to it the kernel is the same
_LEAST_BLOCK = 16  # packed queries, the least that the matrix units take
_ROW_FIELDS: tl.constexpr = tl.constexpr(5)


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
    tile that it shares keys with + 1. strips: blocks per strip; all blocks. owners: [blocks]: 4 * row, + 1 in the row's
    first block, + 2 in its last. pieces: [blocks, BLOCK_KEYS / PIECE]: 2 * the cell of a piece's first key + how many
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
    tl.store(rows_ptr + _ROW_FIELDS * row, begin)
    tl.store(rows_ptr + _ROW_FIELDS * row + 1, begin + num_blocks)
    tl.store(rows_ptr + _ROW_FIELDS * row + 2, first_key)
    tl.store(rows_ptr + _ROW_FIELDS * row + 3, end_key)
    tl.store(rows_ptr + _ROW_FIELDS * row + 4, tile)
    if row == 0:
        total = tl.sum(tl.where(all_rows < num_rows, blocks_of, 0))
        tl.store(strips_ptr, tl.maximum(tl.cdiv(total, num_strips), 1))
        tl.store(strips_ptr + 1, total)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        owner = 4 * row + tl.where(block == 0, 1, 0) + tl.where(block == num_blocks - 1, 2, 0)
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
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for block in tl.range(start, stop, num_stages=STAGES):
        piece = tl.load(pieces_ptr + block * (BLOCK_KEYS // PIECE) + keys // PIECE)
        inside = keys % PIECE < piece % (2 * PIECE)
        cell = piece // (2 * PIECE) * PIECE + keys % PIECE
        cell = (cell.to(tl.int64) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        owners = tl.load(owners_ptr + block + packed * 0)  # the same number each: so it is loaded ahead, like keys
        tokens = (owners // 4 * NUM_QUERIES + query).to(tl.int64)
        q = tl.load(
            q_ptr + tokens[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        k = tl.load(k_ptr + cell[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        owner = tl.load(owners_ptr + block)
        row = owner // 4
        seen = inside[None, :]
        if WINDOW or NUM_QUERIES > 1:
            past = block - tl.load(rows_ptr + _ROW_FIELDS * row)
            positions = (tl.load(rows_ptr + _ROW_FIELDS * row + 2) + past * BLOCK_KEYS + keys)[None, :]
            query_positions = (tl.load(rows_ptr + _ROW_FIELDS * row + 3) - NUM_QUERIES + query)[:, None]
            seen = seen & (positions <= query_positions)
            if WINDOW:
                seen = seen & (positions > query_positions - WINDOW)
        if owner % 2 == 1:
            maximum = no_maximum
            total = no_total
            accumulator = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        v = tl.load(v_ptr + cell[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        accumulator, maximum, total = add_block(scores, seen, v, accumulator, maximum, total, scale, SOFT_CAP)
        closes = owner % 4 >= 2
        if closes | (block == stop - 1):
            out, lse = finish(accumulator, maximum, total)
            row_ptr = rows_ptr + _ROW_FIELDS * row
            token = (row * NUM_QUERIES + query).to(tl.int64)
            if closes & (tl.load(row_ptr) >= start) & (tl.load(row_ptr + 4) == 0):
                index = (token * NUM_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
                tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=valid[:, None])
            else:
                part = ((row + strip).to(tl.int64) * NUM_KV_HEADS + kv_head) * PACKED + packed
                tl.store(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], out, mask=valid[:, None])
                tl.store(lse_ptr + part, lse, mask=valid)


@triton.jit
def _add_parts(
    merged,
    maximum,
    total,
    parts_ptr,
    lse_ptr,
    ends_ptr,
    strip_len,
    entry,
    offset,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Add one head's parts of a row, or of a tile, whose first and end block are at `ends_ptr`.

    offset: of the query and head among the `stride` ones of a part.
    """
    dims = tl.arange(0, HEAD_DIM)
    last = (tl.load(ends_ptr + 1) - 1) // strip_len
    for block in range(tl.load(ends_ptr) // strip_len, last + 1, BLOCK_PARTS):
        strips = block + tl.arange(0, BLOCK_PARTS)
        part = (entry + strips).to(tl.int64) * stride + offset
        lse = tl.load(lse_ptr + part, mask=strips <= last, other=-float("inf"))
        values = tl.load(parts_ptr + part[:, None] * HEAD_DIM + dims, mask=(strips <= last)[:, None], other=0.0)
        higher = tl.maximum(maximum, tl.max(lse, 0))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        decay, weights = tl.exp2(maximum - reference), tl.exp2(lse - reference)
        merged = merged * decay + tl.sum(values * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        maximum = higher
    return merged, maximum, total


@Kernel
@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "strips_ptr", "tiles_ptr", "tile_strips_ptr", "shares_ptr"])
def _merge_kernel(
    out_ptr,
    parts_ptr,
    lse_ptr,
    rows_ptr,
    strips_ptr,
    shared_parts_ptr,
    shared_lse_ptr,
    tiles_ptr,
    tile_strips_ptr,
    shares_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of one query and head, if it has several, become its row of `out` [T, NUM_HEADS, HEAD_DIM]."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PACKED: tl.constexpr = NUM_QUERIES * GROUP
    token, head = tl.program_id(0), tl.program_id(1)
    row, kv_head = token // NUM_QUERIES, head // GROUP
    row_ptr = rows_ptr + _ROW_FIELDS * row
    strip_len = tl.load(strips_ptr)
    tile = tl.load(row_ptr + 4) - 1
    if (tl.load(row_ptr) // strip_len < (tl.load(row_ptr + 1) - 1) // strip_len) | (tile >= 0):
        merged, maximum, total = _add_parts(
            tl.zeros([HEAD_DIM], tl.float32),
            tl.full([], -float("inf"), tl.float32),
            tl.full([], 0.0, tl.float32),
            parts_ptr,
            lse_ptr,
            row_ptr,
            strip_len,
            row,
            kv_head * PACKED + (token % NUM_QUERIES) * GROUP + head % GROUP,
            NUM_KV_HEADS * PACKED,
            HEAD_DIM,
            BLOCK_PARTS,
        )
        if HAS_SHARED:  # noqa: SIM102 (only the outer one is known when the kernel is compiled)
            if tile >= 0:
                merged, maximum, total = _add_parts(
                    merged,
                    maximum,
                    total,
                    shared_parts_ptr,
                    shared_lse_ptr,
                    tiles_ptr + TILE_FIELDS * tile,
                    tl.load(tile_strips_ptr),
                    tile,
                    kv_head * SHARED_BLOCK + tl.load(shares_ptr + SHARE_FIELDS * row + 2) * GROUP + head % GROUP,
                    NUM_KV_HEADS * SHARED_BLOCK,
                    HEAD_DIM,
                    BLOCK_PARTS,
                )
        out = merged / tl.where(total == 0, 1.0, total)
        index = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
        tl.store(out_ptr + index + tl.arange(0, HEAD_DIM), out.to(out_ptr.dtype.element_ty))


class BalancedDecode:
    """The lists of one lane: made on the device when a step is planned, read by all of its layers."""

    def __init__(self, shape: AttentionShape, max_rows: int, num_processors: int) -> None:
        self._shape = shape
        self._max_rows = max_rows
        self._num_processors = num_processors
        wide = shape.head_dim > 128  # twice the registers and shared memory, or more
        self._num_warps, num_programs = (4, _PROGRAMS // 2) if wide else (2, _PROGRAMS)
        self._num_strips = max(1, num_programs * num_processors // shape.num_kv_heads)
        self._piece = math.gcd(shape.page_size, BLOCK_KEYS)
        # What lies before a window's first key in its piece may make a block more.
        most_blocks = max_rows * (-(-shape.max_pages * shape.page_size // BLOCK_KEYS) + 1)
        sizes = (_ROW_FIELDS.value * max_rows, 2, most_blocks, most_blocks * (BLOCK_KEYS // self._piece))
        lists = torch.zeros(sum(sizes), dtype=torch.int32, device=shape.device).split(sizes)
        self._rows, self._strips, self._owners, self._pieces = lists
        self._cascade: Cascade | None = None  # made when it is first needed
        self._common = {  # of both kernels
            "NUM_HEADS": shape.num_heads,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            **early_launch(shape.device),
        }
        self._attends: dict[tuple[int, bool], Attend] = {}  # by queries per row, and whether prefixes are shared

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
            BLOCK_KEYS=BLOCK_KEYS,
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
            NUM_QUERIES=num_queries,
            WINDOW=shape.window or 0,
            SOFT_CAP=shape.soft_cap or 0.0,
            HAS_SINKS=sinks is not None,
            PIECE=self._piece,
            BLOCK=max(_LEAST_BLOCK, next_power_of_2(packed)),
            BLOCK_KEYS=BLOCK_KEYS,
            STAGES=2 if shape.dtype.itemsize == 2 else 1,  # keys and values of each stage wait in shared memory
            num_warps=self._num_warps,
            **self._common,
        )
        own = parts, lse, self._rows, self._strips
        shared = own if cascade is None else cascade.attend(page_tables, q, k_pages, v_pages)
        _merge_kernel[(len(q), shape.num_heads)](
            out,
            *own,
            *shared,
            self._rows if cascade is None else cascade.shares,
            NUM_QUERIES=num_queries,
            HAS_SHARED=cascade is not None,
            SHARED_BLOCK=_LEAST_BLOCK if cascade is None else cascade.block,
            BLOCK_PARTS=8,
            num_warps=1,
            **self._common,
        )
        return out
