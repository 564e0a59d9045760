"""Attention over keys and values that lie one row after the other, in Triton, after FlashAttention-2 (Dao, 2023).

Keys and values may be of different sizes. Keys come in two parts, since N + R is seldom a power of two. The parts of a
query's attention are merged by their log-sum-exps.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.attention.contract import AttentionShape
from hornbeam.ops.launch import Kernel, cdiv, next_power_of_2
from hornbeam.ops.mla.contract import RaggedAttend, Stretch

_BLOCK_QUERIES = 64
_BLOCK_KEYS = 64
_MERGED_ROWS = 16  # of queries and heads, per program


@Kernel
@triton.jit
def _ragged_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One tile of queries and one head. tiles: [tiles, 4] int32: first query token, queries, first key, keys; of a
    causal tile the keys end with the last query's own."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles_ptr + 4 * tile)
    num_queries = tl.load(tiles_ptr + 4 * tile + 1)
    first_key = tl.load(tiles_ptr + 4 * tile + 2)
    num_keys = tl.load(tiles_ptr + 4 * tile + 3)
    queries = tl.arange(0, BLOCK)
    valid = queries < num_queries
    nope, rope, values = tl.arange(0, NOPE_BLOCK), tl.arange(0, ROPE_BLOCK), tl.arange(0, VALUE_BLOCK)
    token = (first + queries).to(tl.int64)
    q = q_ptr + token[:, None] * q_stride + head * q_head_stride
    q_nope = tl.load(q + nope[None, :], mask=valid[:, None] & (nope < NOPE_DIM)[None, :], other=0.0)
    q_rope = tl.load(q + NOPE_DIM + rope[None, :], mask=valid[:, None] & (rope < ROPE_DIM)[None, :], other=0.0)
    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
    for block in range(0, num_keys, BLOCK_KEYS):
        keys = block + tl.arange(0, BLOCK_KEYS)
        inside = keys < num_keys
        place = (first_key + keys).to(tl.int64)
        k = k_ptr + place[None, :] * k_stride + head * k_head_stride
        k_nope = tl.load(k + nope[:, None], mask=inside[None, :] & (nope < NOPE_DIM)[:, None], other=0.0)
        k_rope = tl.load(k + NOPE_DIM + rope[:, None], mask=inside[None, :] & (rope < ROPE_DIM)[:, None], other=0.0)
        scores = tl.dot(q_nope, k_nope, input_precision="ieee")
        scores = tl.dot(q_rope, k_rope, scores, input_precision="ieee") * (scale * 1.4426950408889634)  # to base 2
        seen = inside[None, :]
        if CAUSAL:
            seen = keys[None, :] < (num_keys - num_queries + 1 + queries)[:, None]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        v = tl.load(
            v_ptr + place[:, None] * v_stride + head * v_head_stride + values[None, :],
            mask=inside[:, None] & (values < VALUE_DIM)[None, :],
            other=0.0,
        )
        accumulator = accumulator * decay[:, None]
        accumulator += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        maximum = higher
    divisor = tl.where(total == 0, 1.0, total)
    part = token * NUM_HEADS + head
    out = (accumulator / divisor[:, None]).to(out_ptr.dtype.element_ty)
    inside_values = valid[:, None] & (values < VALUE_DIM)[None, :]
    tl.store(out_ptr + part[:, None] * VALUE_DIM + values[None, :], out, mask=inside_values)
    tl.store(lse_ptr + part, maximum + tl.log2(divisor), mask=valid)


@Kernel
@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    out_ptr, lse_ptr, other_ptr, other_lse_ptr, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Add the other parts [rows, DIM] to the first ones, in place."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    present = rows < num_rows
    mine = tl.load(lse_ptr + rows, mask=present, other=0.0)
    theirs = tl.load(other_lse_ptr + rows, mask=present, other=0.0)
    highest = tl.maximum(mine, theirs)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    share, other_share = tl.exp2(mine - highest), tl.exp2(theirs - highest)
    total = share + other_share
    divisor = tl.where(total == 0, 1.0, total)
    features = tl.arange(0, BLOCK)[None, :]
    place, inside = rows[:, None] * DIM + features, present[:, None] & (features < DIM)
    out = tl.load(out_ptr + place, mask=inside, other=0.0)
    other = tl.load(other_ptr + place, mask=inside, other=0.0)
    merged = out.to(tl.float32) * (share / divisor)[:, None] + other.to(tl.float32) * (other_share / divisor)[:, None]
    tl.store(out_ptr + place, merged.to(out.dtype), mask=inside)
    tl.store(lse_ptr + rows, highest + tl.log2(total), mask=present)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """See `Ragged.merge`."""
    assert out.is_contiguous()
    assert other.is_contiguous()
    assert lse.is_contiguous()
    assert other_lse.is_contiguous()
    _merge_kernel[(cdiv(lse.numel(), _MERGED_ROWS),)](
        out,
        lse,
        other,
        other_lse,
        lse.numel(),
        DIM=out.shape[2],
        BLOCK=next_power_of_2(out.shape[2]),
        ROWS=_MERGED_ROWS,
    )


class TritonRagged:
    """See `Ragged`. There is nothing to plan but the tiles."""

    def __init__(self, shape: AttentionShape) -> None:
        assert shape.latent is not None
        self._shape = shape
        self._sizes = shape.latent

    def plan(self, stretches: Sequence[Stretch]) -> Sequence[RaggedAttend]:
        """See `Ragged`."""
        return [self._attend(stretch) for stretch in stretches]

    def merge(self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        """See `Ragged`."""
        merge(out, lse, other, other_lse)

    def _attend(self, stretch: Stretch) -> RaggedAttend:
        tiles = torch.tensor(_tiles(stretch), dtype=torch.int32).to(self._shape.device, non_blocking=True)
        sizes = self._sizes
        blocks: dict[str, int] = {}
        for name, size in (("NOPE", sizes.nope_dim), ("ROPE", sizes.rope_dim), ("VALUE", sizes.value_dim)):
            blocks |= {f"{name}_DIM": size, f"{name}_BLOCK": max(16, next_power_of_2(size))}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            assert q.stride(2) == k.stride(2) == v.stride(2) == 1
            num_heads = q.shape[1]
            out = q.new_empty(*q.shape[:2], sizes.value_dim)
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            _ragged_kernel[(len(tiles), num_heads)](
                q,
                k,
                v,
                out,
                lse,
                tiles,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                v.stride(0),
                v.stride(1),
                self._shape.scale,
                NUM_HEADS=num_heads,
                CAUSAL=stretch.causal,
                BLOCK=_BLOCK_QUERIES,
                BLOCK_KEYS=_BLOCK_KEYS,
                num_stages=2 if q.element_size() == 2 else 1,
                **blocks,
            )
            return out, lse

        return attend


def _tiles(stretch: Stretch) -> list[tuple[int, int, int, int]]:
    """Tiles of at most so many queries, as the kernel takes them; the longest ones of a row first."""
    begins = (accumulate(lens, initial=0) for lens in (stretch.query_lens, stretch.key_lens))
    return [
        (begin + start, size, first_key, num_keys - (num_queries - start - size if stretch.causal else 0))
        for begin, first_key, num_queries, num_keys in zip(*begins, stretch.query_lens, stretch.key_lens, strict=False)
        for start in reversed(range(0, num_queries, _BLOCK_QUERIES))
        for size in (min(_BLOCK_QUERIES, num_queries - start),)
    ]
