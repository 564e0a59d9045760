"""What strips found out about rows that they cut, and about prefixes that rows share, becomes those rows' attention.

Parts are means of values beside their log-sum-exps; those of a row lie one behind the other, by strip. Rows that lie in
one strip and share nothing are no business of this.
"""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.cascade import SHARE_FIELDS, TILE_FIELDS
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2

_BLOCK_FLOATS = 512  # of a part, at most: rather more parts at a time
_WARP_FLOATS = 4096  # of all parts at a time
ROW_FIELDS: tl.constexpr = tl.constexpr(5)

# Values [entries + strips, Hk, N, D] and log-sum-exps [entries + strips, Hk, N], float32, by the sums of an entry and a
# strip, where an entry is a row or a tile; int32: records of the entries, which begin with the first block and the one
# after the last; blocks per strip.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


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
    offsets,
    valid,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Add the parts of a row, or of a tile, whose first and end block are at `ends_ptr`.

    offsets: of queries and heads among the `stride` ones of a part.
    """
    dims = tl.arange(0, HEAD_DIM)
    last = (tl.load(ends_ptr + 1) - 1) // strip_len
    for block in range(tl.load(ends_ptr) // strip_len, last + 1, BLOCK_PARTS):
        strips = block + tl.arange(0, BLOCK_PARTS)
        part = (entry + strips).to(tl.int64)[:, None] * stride + offsets[None, :]
        there = (strips <= last)[:, None] & valid[None, :]
        lse = tl.load(lse_ptr + part, mask=there, other=-float("inf"))
        values = tl.load(parts_ptr + part[:, :, None] * HEAD_DIM + dims, mask=there[:, :, None], other=0.0)
        higher = tl.maximum(maximum, tl.max(lse, 0))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        decay, weights = tl.exp2(maximum - reference), tl.exp2(lse - reference[None, :])
        merged = merged * decay[:, None] + tl.sum(values * weights[:, :, None], 0)
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
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of one row for one key-value head, if it has any."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PACKED: tl.constexpr = NUM_QUERIES * GROUP
    row, kv_head = tl.program_id(0), tl.program_id(1)
    packed = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    valid = packed < PACKED
    strip_len = tl.load(strips_ptr)
    begin, end = tl.load(rows_ptr + ROW_FIELDS * row), tl.load(rows_ptr + ROW_FIELDS * row + 1)
    tile = tl.load(rows_ptr + ROW_FIELDS * row + 4) - 1
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (begin // strip_len < (end - 1) // strip_len) | (tile >= 0):
        merged, maximum, total = _add_parts(
            tl.zeros([BLOCK, HEAD_DIM], tl.float32),
            tl.full([BLOCK], -float("inf"), tl.float32),
            tl.zeros([BLOCK], tl.float32),
            parts_ptr,
            lse_ptr,
            rows_ptr + ROW_FIELDS * row,
            strip_len,
            row,
            kv_head * PACKED + packed,
            valid,
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
                    kv_head * SHARED_BLOCK + tl.load(shares_ptr + SHARE_FIELDS * row + 2) * GROUP + packed,
                    valid,
                    NUM_KV_HEADS * SHARED_BLOCK,
                    HEAD_DIM,
                    BLOCK_PARTS,
                )
        out = merged / tl.where(total == 0, 1.0, total)[:, None]
        token = (row * NUM_QUERIES + packed // GROUP).to(tl.int64)
        index = (token * NUM_HEADS + kv_head * GROUP + packed % GROUP)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)
        tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def merge(out: Tensor, own: Parts, num_queries: int, shared: tuple[Parts, Tensor] | None = None) -> None:
    """Write to `out` [T, Hq, D] all rows that have parts; each has `num_queries` of the T.

    own: of rows; shared: of tiles, and `Cascade.shares`.
    """
    num_heads, head_dim = out.shape[1:]
    num_kv_heads, packed = own[1].shape[1:]
    tiles, shares = shared or (own, own[2])
    block = min(next_power_of_2(packed), max(1, _BLOCK_FLOATS // head_dim))
    _merge_kernel[(len(out) // num_queries, num_kv_heads, cdiv(packed, block))](
        out,
        *own,
        *tiles,
        shares,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        NUM_QUERIES=num_queries,
        HAS_SHARED=shared is not None,
        SHARED_BLOCK=tiles[1].shape[2],
        BLOCK=block,
        BLOCK_PARTS=min(max(_WARP_FLOATS // (block * head_dim), 1), 32),
        num_warps=1,
        **early_launch(out.device),
    )
