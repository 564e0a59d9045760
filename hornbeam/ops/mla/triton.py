"""Absorbed latent attention in Triton, after FlashAttention-2 (Dao, 2023): a row of the cache is loaded once for all
heads of a tile, as key and as value.

The work is cut into tiles: some consecutive queries of a row, with some of their heads. In decode, a tile's keys are
split over several programs, so that a few long rows fill the device; the parts are merged by their log-sum-exps, for
few tokens by the kernel that makes values of them. The grid depends on the number of rows, never on lengths, so it can
be captured. Prefill is done by `prefill` with this and `triton_ragged`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.contract import Attention, AttentionShape, LatentAttend, Rows
from hornbeam.ops.attention.triton import merge_parts, tiles
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.mla.prefill import LatentPrefill, values_of
from hornbeam.ops.mla.triton_ragged import TritonRagged
from hornbeam.ops.query import OpQuery

_TILE = 64  # queries times heads of a prefill tile
_LEAST_TILE = 16  # heads of a decode tile, and of one in float32, which fills registers: what the matrix units take
_MAX_SPLITS = 32
_PROGRAMS = 256  # enough to fill a large device
_FUSED_TOKENS = 8  # the most for which values are made while parts are merged
_BLOCK_VALUES = 32
_BLOCK_KEYS = 64


# Slots come out of an upload at any offset: specialised on alignment, the kernel would be compiled twice.
@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _attend_kernel(
    q_ptr,
    pages_ptr,
    out_ptr,
    lse_ptr,
    page_tables_ptr,
    slots_ptr,
    lens_ptr,
    tiles_ptr,
    page_table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile, HEADS of the heads, one stretch of keys.

    tiles: [num_tiles, 3] int32: the row, the tile's first query token, the row's queries from that one on.
    q: [T, NUM_HEADS, RANK + ROPE_DIM]; out: [T, NUM_HEADS, NUM_SPLITS, RANK];
    lse: [T, NUM_HEADS, NUM_SPLITS] float32, base 2, if NUM_SPLITS > 1.
    What describes the step is older than the kernel ahead, which waited for it: so its loads need not wait.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    ROW: tl.constexpr = RANK + ROPE_DIM
    tile, head_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    remaining = tl.load(tiles_ptr + 3 * tile + 2)
    num_queries = tl.minimum(remaining, BLOCK // HEADS)
    position = tl.load(lens_ptr + row) - remaining  # of the first query
    end = position + num_queries  # keys that the last query sees

    packed = tl.arange(0, BLOCK)
    query, head = packed // HEADS, head_block * HEADS + packed % HEADS
    valid = (query < num_queries) & (head < NUM_HEADS)
    stretch = tl.cdiv(tl.cdiv(end, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    start = split * stretch
    offsets = tl.arange(0, BLOCK_KEYS)
    table = page_tables_ptr + tl.load(slots_ptr + row) * page_table_stride
    page = tl.load(table + (start + offsets) // PAGE_SIZE, mask=start + offsets < end, other=0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    index = (first + query).to(tl.int64) * NUM_HEADS + head
    features, rope = tl.arange(0, RANK), tl.arange(0, ROPE_BLOCK)
    q = q_ptr + index[:, None] * ROW
    q_latent = tl.load(q + features[None, :], mask=valid[:, None], other=0.0)
    q_rope = tl.load(q + RANK + rope[None, :], mask=valid[:, None] & (rope < ROPE_DIM)[None, :], other=0.0)

    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, RANK], tl.float32)
    for block in range(start, tl.minimum(start + stretch, end), BLOCK_KEYS):
        keys = block + offsets
        inside = keys < end
        cell = pages_ptr + (page.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE) * ROW
        following = keys + BLOCK_KEYS
        page = tl.load(table + following // PAGE_SIZE, mask=following < end, other=0)
        latent = tl.load(cell[:, None] + features[None, :], mask=inside[:, None], other=0.0)
        turned = tl.load(
            cell[None, :] + RANK + rope[:, None], mask=inside[None, :] & (rope < ROPE_DIM)[:, None], other=0.0
        )
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, turned, scores, input_precision="ieee") * (scale * 1.4426950408889634)  # to base 2
        scores = tl.where(keys[None, :] <= (position + query)[:, None], scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        accumulator = accumulator * decay[:, None]
        accumulator += tl.dot(weights.to(latent.dtype), latent, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        maximum = higher

    part = index * NUM_SPLITS + split
    divisor = tl.where(total == 0, 1.0, total)  # a part that saw no key counts nothing: its lse is -inf
    out = (accumulator / divisor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + part[:, None] * RANK + features[None, :], out, mask=valid[:, None])
    if NUM_SPLITS > 1:
        tl.store(lse_ptr + part, maximum + tl.log2(divisor), mask=valid)


@Kernel
@triton.jit
def _values_kernel(
    parts_ptr,
    lse_ptr,
    up_ptr,
    out_ptr,
    up_head_stride,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK_VALUES features of one head's value for one token: merge the parts, multiply by their rows of `up`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values = tl.program_id(2) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    features, splits = tl.arange(0, RANK), tl.arange(0, NUM_SPLITS)
    weights = tl.load(  # of the model, so they need not wait
        up_ptr + head.to(tl.int64) * up_head_stride + (NOPE_DIM + values)[:, None] * RANK + features[None, :],
        mask=(values < VALUE_DIM)[:, None],
        other=0.0,
    )
    if EARLY:
        tl.extra.cuda.gdc_wait()
    index = token * NUM_HEADS + head
    lse = tl.load(lse_ptr + index * NUM_SPLITS + splits)
    shares = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.load(  # but for those that saw no key
        parts_ptr + (index * NUM_SPLITS + splits)[:, None] * RANK + features[None, :],
        mask=(shares > 0)[:, None],
        other=0.0,
    )
    latent = tl.sum(parts * shares[:, None], 0) / tl.sum(shares, 0)
    latent = latent.to(weights.dtype).to(tl.float32)
    out = tl.sum(weights.to(tl.float32) * latent[None, :], 1)
    tl.store(out_ptr + index * VALUE_DIM + values, out.to(out_ptr.dtype.element_ty), mask=values < VALUE_DIM)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiling:
    """How queries and heads are cut into tiles."""

    queries: int  # of a tile
    heads: int  # likewise, a power of two
    head_blocks: int

    @classmethod
    def of(cls, num_heads: int, queries: int | None, dtype: torch.dtype) -> "_Tiling":
        """queries: of a row, the same for all; None: they differ, and a tile takes as many as there is room for."""
        most = _TILE if dtype.itemsize == 2 and queries is None else _LEAST_TILE
        heads = min(most, next_power_of_2(num_heads))
        return cls(queries=queries or most // heads, heads=heads, head_blocks=cdiv(num_heads, heads))


class TritonLatentAttention:
    """Everything a step changes is read from the device; there is nothing to plan but the tiles."""

    def __init__(self, shape: AttentionShape, max_rows: int) -> None:
        assert shape.latent is not None
        self._shape = shape
        self._sizes = shape.latent
        self._max_rows = max_rows
        self._decode_tiles: dict[int, Tensor] = {}  # by queries per row, for max_rows rows
        self._captured: dict[tuple[int, ...], LatentAttend] = {}  # by rows, their queries, the address of slots
        self._prefill = LatentPrefill(shape, TritonRagged(shape), self.plan_absorbed)

    def plan_decode(self, rows: Rows) -> LatentAttend:
        """See `Attention`."""
        num_rows, num_queries = len(rows.query_lens), rows.query_lens[0]
        assert all(length == num_queries for length in rows.query_lens)
        key = num_rows, num_queries, rows.slots.data_ptr()
        if rows.captured and key in self._captured:
            return self._captured[key]
        if num_queries not in self._decode_tiles:
            self._decode_tiles[num_queries] = self._upload(tiles((num_queries,) * self._max_rows, num_queries))
        tiling = _Tiling.of(self._shape.num_heads, num_queries, self._shape.dtype)
        programs = num_rows * tiling.head_blocks
        num_splits = min(_MAX_SPLITS, next_power_of_2(cdiv(_PROGRAMS, programs)))
        attend = self._attend(rows, self._decode_tiles[num_queries][:num_rows], tiling, num_splits)
        if rows.captured:
            self._captured[key] = attend
        return attend

    def plan_prefill(self, rows: Rows) -> LatentAttend:
        """See `Attention`."""
        return self._prefill.plan(rows)

    def plan_absorbed(self, rows: Rows) -> LatentAttend:
        """For rows with any numbers of queries."""
        tiling = _Tiling.of(self._shape.num_heads, None, self._shape.dtype)
        return self._attend(rows, self._upload(tiles(rows.query_lens, tiling.queries)), tiling, num_splits=1)

    def _upload(self, tiles: list[tuple[int, int, int]]) -> Tensor:
        return torch.tensor(tiles, dtype=torch.int32).to(self._shape.device, non_blocking=True)

    def _attend(self, rows: Rows, tiles: Tensor, tiling: _Tiling, num_splits: int) -> LatentAttend:
        shape, sizes = self._shape, self._sizes
        block = max(_LEAST_TILE, next_power_of_2(tiling.queries) * tiling.heads)
        early = early_launch(shape.device)
        half = shape.dtype.itemsize == 2
        grid = len(tiles), tiling.head_blocks, num_splits

        def run(q: Tensor, row: Tensor, pages: Tensor, up: Tensor) -> Tensor:
            assert q.is_contiguous()
            assert pages.is_contiguous()
            out = parts = lse = q.new_empty(*q.shape[:2], sizes.rank)
            if num_splits > 1:
                lse = torch.empty((*q.shape[:2], num_splits), dtype=torch.float32, device=q.device)
                parts = torch.empty((*lse.shape, sizes.rank), dtype=torch.float32, device=q.device)
            _attend_kernel[grid](
                q,
                pages,
                parts,
                lse,
                rows.page_tables,
                rows.slots,
                rows.lens,
                tiles,
                rows.page_tables.stride(0),
                shape.scale,
                NUM_HEADS=shape.num_heads,
                HEADS=tiling.heads,
                RANK=sizes.rank,
                ROPE_DIM=sizes.rope_dim,
                ROPE_BLOCK=max(16, next_power_of_2(sizes.rope_dim)),
                PAGE_SIZE=shape.page_size,
                NUM_SPLITS=num_splits,
                BLOCK=block,
                BLOCK_KEYS=_BLOCK_KEYS if half else _BLOCK_KEYS // 2,
                num_warps=8,
                num_stages=2 if half else 1,  # rows of each stage wait in shared memory
                **early,
            )
            if num_splits > 1 and len(q) <= _FUSED_TOKENS:
                return self._values(parts, lse, up)
            if num_splits > 1:
                merge_parts(parts, lse, out)
            return values_of(out, up, shape)

        return LatentAttend(absorbed=True, run=run)

    def _values(self, parts: Tensor, lse: Tensor, up: Tensor) -> Tensor:
        """Merge parts [T, Hq, splits, C], and make values of them."""
        num_tokens, num_heads, num_splits, rank = parts.shape
        sizes = self._sizes
        out = up.new_empty(num_tokens, num_heads, sizes.value_dim)
        _values_kernel[(num_tokens, num_heads, cdiv(sizes.value_dim, _BLOCK_VALUES))](
            parts,
            lse,
            up,
            out,
            up.stride(0),
            NUM_HEADS=num_heads,
            NOPE_DIM=sizes.nope_dim,
            VALUE_DIM=sizes.value_dim,
            RANK=rank,
            NUM_SPLITS=num_splits,
            BLOCK_VALUES=_BLOCK_VALUES,
            num_warps=8,
            **early_launch(up.device),
        )
        return out


class TritonLatentBackend:
    """Latents whose size is a power of two."""

    captures = True
    captures_prefill = False
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices; latents of 16 features or more, a power of two."""
        rank = 0 if query.latent is None else query.latent.rank
        if rank < 16 or rank & (rank - 1):
            return f"a latent of {rank} features is not a power of two of at least 16"
        return needs_cuda(query)

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return TritonLatentAttention(shape, max_rows)


BACKEND = TritonLatentBackend()
