"""Paged attention in Triton: prefill, and what `balanced` (decode of several rows) and `triton_row` (of one) leave.

The work is cut into tiles: some consecutive queries of a row, with all query heads that share a key-value head. Where
one row decodes, in recorded prefill and in that of few tiles, a tile's keys are split over several programs, so that a
few long rows fill the device; a second kernel merges the parts by their log-sum-exps. The grid depends on the numbers
of rows and queries, never on lengths, so it can be captured.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.balanced import BalancedDecode
from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows, StoringAttend
from hornbeam.ops.attention.paged_keys import BLOCK_KEYS, LOG2_E, attend_keys, num_stages
from hornbeam.ops.attention.triton_row import plan_row
from hornbeam.ops.device import needs_cuda, num_multiprocessors
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.query import OpQuery

_DECODE_BLOCK = 16  # packed queries of a single row: the least that the matrix units take
_MAX_SPLITS = 32  # of its keys
_PROGRAMS = 512  # enough to fill a large device
_PREFILL_BLOCK = 64  # packed queries of a prefill tile: queries times the heads of a group
_PREFILL_SPLITS = 4  # where keys of prefill are split: one number for all, so that the kernel is compiled once


# Slots come out of an upload at any offset: specialised on alignment, the kernel would be compiled twice.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    page_tables_ptr,
    slots_ptr,
    lens_ptr,
    tiles_ptr,
    sinks_ptr,
    q_stride,
    q_head_stride,
    page_table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile, one key-value head, one stretch of keys.

    tiles: [num_tiles, 3] int32: the row, the tile's first query token, the row's queries from that one on.
    WINDOW and SOFT_CAP: 0 for none; sinks: [NUM_HEADS].
    out: [T, NUM_HEADS, NUM_SPLITS, HEAD_DIM]; lse: [T, NUM_HEADS, NUM_SPLITS] float32, base 2, if NUM_SPLITS > 1.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    remaining = tl.load(tiles_ptr + 3 * tile + 2)
    num_queries = tl.minimum(remaining, BLOCK // GROUP)
    position = tl.load(lens_ptr + row) - remaining  # of the first query
    # The page with the first key that the first query sees.
    begin = tl.maximum(position - WINDOW + 1, 0) // PAGE_SIZE * PAGE_SIZE if WINDOW else 0
    end = position + num_queries  # keys that the last query sees

    packed = tl.arange(0, BLOCK)
    query, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    valid = query < num_queries
    token = (first + query).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    stretch = tl.cdiv(tl.cdiv(end - begin, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    start = begin + split * stretch
    table = page_tables_ptr + tl.load(slots_ptr + row) * page_table_stride
    if EARLY:
        tl.extra.cuda.gdc_wait()
    q = tl.load(
        q_ptr + token[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
        mask=valid[:, None],
        other=0.0,
    )

    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_SINKS:  # noqa: SIM102 (only the outer one is known when the kernel is compiled)
        if split == 0:  # as if it had seen a key with that score and a value of zeros
            maximum = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
            total += 1.0
    out, lse = attend_keys(
        q,
        k_ptr,
        v_ptr,
        table,
        kv_head,
        start,
        tl.minimum(start + stretch, end),
        position + query,
        maximum,
        total,
        scale,
        NUM_KV_HEADS,
        HEAD_DIM,
        PAGE_SIZE,
        WINDOW,
        SOFT_CAP,
        True,
        BLOCK_KEYS,
    )
    part = (token * NUM_HEADS + head) * NUM_SPLITS + split
    tl.store(out_ptr + part[:, None] * HEAD_DIM + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None])
    if NUM_SPLITS > 1:
        tl.store(lse_ptr + part, lse, mask=valid)


@Kernel
@triton.jit
def _merge_kernel(parts_ptr, lse_ptr, out_ptr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, EARLY: tl.constexpr):
    """Combine the parts of one token and head, weighted by their shares of the sum of exponentials."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, HEAD_DIM)
    parts = tl.load(parts_ptr + (index * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :])
    lse = tl.load(lse_ptr + index * NUM_SPLITS + splits)
    highest = tl.max(lse, 0)
    shares = tl.exp2(lse - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(shares, 0)  # 0 if no part saw a key: the result is zeros then
    out = tl.sum(parts * shares[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + index * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty))


class TiledPrefill:
    """Prefill of one lane."""

    def __init__(self, shape: AttentionShape, num_processors: int) -> None:
        self._shape = shape
        self._num_processors = num_processors
        # By queries and the address of their rows' slots: the tiles' buffer, and its reader.
        self._recorded: dict[tuple[int, int], tuple[Tensor, Attend]] = {}

    def plan(self, rows: Rows) -> Attend:
        """See `Attention.plan_prefill`."""
        group = self._shape.num_heads // self._shape.num_kv_heads
        tile_len = max(_PREFILL_BLOCK, next_power_of_2(group)) // group
        listed = tiles(rows.query_lens, tile_len)
        if not rows.captured:
            fills = len(listed) * self._shape.num_kv_heads > self._num_processors
            num_splits = 1 if fills else _PREFILL_SPLITS
            return attend_tiles(self._shape, rows, _upload(listed, self._shape.device), tile_len, num_splits)
        num_queries = sum(rows.query_lens)
        key = num_queries, rows.slots.data_ptr()
        if key not in self._recorded:
            most_tiles = cdiv(num_queries, tile_len) + len(rows.query_lens) - 1
            buffer = torch.zeros((most_tiles, 3), dtype=torch.int32, device=self._shape.device)
            self._recorded[key] = buffer, attend_tiles(self._shape, rows, buffer, tile_len, _PREFILL_SPLITS)
        buffer, attend = self._recorded[key]
        empty = [(0, 0, 0)] * (len(buffer) - len(listed))
        buffer.copy_(torch.tensor(listed + empty, dtype=torch.int32), non_blocking=True)
        return attend


class TritonAttention:
    """Everything a step changes is read from the device: there is little to plan."""

    def __init__(self, shape: AttentionShape, max_rows: int) -> None:
        self._shape = shape
        num_processors = num_multiprocessors(shape.device)
        self._decode = BalancedDecode(shape, max_rows, num_processors)
        self._prefill = TiledPrefill(shape, num_processors)
        self._row_tile = _upload(tiles((1,), 1), shape.device)
        self._captured_rows: dict[int, Attend] = {}  # single rows, by the address of their slots

    def plan_decode(self, rows: Rows) -> Attend:
        """See `Attention`."""
        if len(rows.query_lens) > 1 or rows.query_lens[0] > 1 or rows.shared is not None:
            return self._decode.plan(rows)
        key = rows.slots.data_ptr()
        if rows.captured and key in self._captured_rows:
            return self._captured_rows[key]
        attend = self._plan_row(rows)
        if rows.captured:
            self._captured_rows[key] = attend
        return attend

    def _plan_row(self, rows: Rows) -> Attend:
        """One row with one query, which needs no lists."""
        shape = self._shape
        # However many keys there can be: a probe with few must have the same kernels compiled.
        num_splits = min(_MAX_SPLITS, next_power_of_2(cdiv(_PROGRAMS, shape.num_kv_heads)))
        attend = attend_tiles(shape, rows, self._row_tile, 1, num_splits)
        if shape.head_dim < 2 * _DECODE_BLOCK:
            return attend
        return StoringAttend(attend=attend, run=plan_row(shape, rows, merge_parts))

    def plan_prefill(self, rows: Rows) -> Attend:
        """See `Attention`."""
        return self._prefill.plan(rows)


def _upload(tiles: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    return torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True)


def attend_tiles(shape: AttentionShape, rows: Rows, tiles: Tensor, tile_len: int, num_splits: int) -> Attend:
    """Attention of tiles of at most `tile_len` queries (see the kernel), their keys in so many parts."""
    group = shape.num_heads // shape.num_kv_heads
    block = max(_DECODE_BLOCK, next_power_of_2(tile_len * group))
    early = early_launch(shape.device)
    is_single = len(rows.query_lens) == 1 and block == _DECODE_BLOCK
    stages = num_stages(shape)
    if is_single:
        stages = min(stages, 3)  # little code, since one row is over before much could be fetched

    def attend(
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert q.stride(2) == 1
        out = parts = lse = q.new_empty(q.shape) if out is None else out
        if num_splits > 1:
            lse = torch.empty((*q.shape[:2], num_splits), dtype=torch.float32, device=q.device)
            parts = torch.empty((*lse.shape, shape.head_dim), dtype=torch.float32, device=q.device)
        _attend_kernel[(len(tiles), shape.num_kv_heads, num_splits)](
            q,
            k_pages,
            v_pages,
            parts,
            lse,
            rows.page_tables,
            rows.slots,
            rows.lens,
            tiles,
            q if sinks is None else sinks,
            q.stride(0),
            q.stride(1),
            rows.page_tables.stride(0),
            shape.scale,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            PAGE_SIZE=shape.page_size,
            WINDOW=shape.window or 0,
            SOFT_CAP=shape.soft_cap or 0.0,
            HAS_SINKS=sinks is not None,
            NUM_SPLITS=num_splits,
            BLOCK=block,
            BLOCK_KEYS=BLOCK_KEYS,
            num_stages=stages,
            num_warps=8 if is_single else 4,
            **early,
        )
        return merge_parts(parts, lse, out) if num_splits > 1 else out

    return attend


def merge_parts(parts: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Merge parts [T, Hq, splits, D] float32 of attention by their log-sum-exps [T, Hq, splits] to base 2.

    The result goes to `out` [T, Hq, D], which is returned. Both numbers, of splits and of features, are powers of two.
    """
    num_tokens, num_heads, num_splits, head_dim = parts.shape
    _merge_kernel[(num_tokens * num_heads,)](
        parts,
        lse,
        out,
        HEAD_DIM=head_dim,
        NUM_SPLITS=num_splits,
        num_warps=max(1, num_splits * head_dim // 4096),  # as few as have the registers: then parts are no one else's
        **early_launch(parts.device),
    )
    return out


def tiles(query_lens: Sequence[int], tile_len: int) -> list[tuple[int, int, int]]:
    """Tiles of at most `tile_len` queries, as the kernel takes them."""
    row_begins = accumulate(query_lens, initial=0)
    return [
        (row, row_begin + start, num_queries - start)
        for row, (row_begin, num_queries) in enumerate(zip(row_begins, query_lens, strict=False))
        for start in range(0, num_queries, tile_len)
    ]


class TritonAttentionBackend:
    """Head sizes that are powers of two."""

    captures = True
    captures_prefill = True
    least_shared = 16384  # on an H200 sharing 512 tokens loses with 8 rows (3,584 are saved) and wins with 64 (32,256)

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices; head sizes that are powers of two from 16 on."""
        if query.head_dim < 16 or query.head_dim & (query.head_dim - 1):
            return f"head size {query.head_dim} is not a power of two of at least 16"
        return needs_cuda(query)

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return TritonAttention(shape, max_rows)


BACKEND = TritonAttentionBackend()
