"""From projection to attention, for latents: norm, rotation and cache write in one kernel, absorption in the same.

Absorbing, a program takes some features of one head for a block of tokens; where it has the head's first ones it turns
the head's end, too. Behind the last head stand the cached rows, of which a program takes some tokens of the block.
"""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery

_BLOCK_FEATURES = 128  # of absorbed queries


@triton.jit
def _turn(x, out, table, present, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Turn the pairs of neighbours from pointers `x` [ROWS, 1] on, to `out`; `table`: their cosines, then sines."""
    features, pairs = tl.arange(0, 2 * HALF_BLOCK)[None, :], tl.arange(0, HALF_BLOCK)[None, :]
    inside = present & (features < 2 * HALF)
    cos = tl.load(table + pairs, mask=present & (pairs < HALF), other=0.0)
    sin = tl.load(table + HALF + pairs, mask=present & (pairs < HALF), other=0.0)
    old = tl.load(x + features, mask=inside, other=0.0)
    first, second = tl.split(tl.reshape(old, (ROWS, HALF_BLOCK, 2)))
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * HALF_BLOCK))
    tl.store(out + features, turned.to(old.dtype), mask=inside)


@triton.jit
def _store_row(
    row,
    cell,
    table,
    weight_ptr,
    present,
    eps,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Normalise and turn the rows of some tokens, into the cache, and in their own place if IN_PLACE.

    row, cell, table: [ROWS, 1] pointers to a token's row, its cell, its angles.
    """
    features = tl.arange(0, RANK_BLOCK)[None, :]
    known = features < RANK
    inside = present & known
    x = tl.load(row + features, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 1) / RANK + eps)[:, None]
    weight = tl.load(weight_ptr + features, mask=known, other=0.0)
    x = (weight.to(tl.float32) * (wide * factor).to(weight.dtype).to(tl.float32)).to(x.dtype)
    tl.store(cell + features, x, mask=inside)
    _turn(row + RANK, cell + RANK, table, present, HALF, HALF_BLOCK, ROWS)
    if IN_PLACE:
        tl.store(row + features, x, mask=inside)
        _turn(row + RANK, row + RANK, table, present, HALF, HALF_BLOCK, ROWS)


# Views of a step's tokens begin at any of them: specialised on alignment, kernels would be compiled twice.
_ANY_ALIGNMENT = ["positions_ptr", "rows_ptr"]


@Kernel
@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _store_kernel(
    q_ptr,
    row_ptr,
    weight_ptr,
    table_ptr,
    positions_ptr,
    pages_ptr,
    rows_ptr,
    q_stride,
    q_head_stride,
    row_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs of a token: one for its row, then some for its heads, HEADS at a time."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = table_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    if part == 0:
        one = tl.zeros([1, 1], tl.int64)
        row = row_ptr + token * row_stride + one
        cell = pages_ptr + tl.load(rows_ptr + token) * (RANK + 2 * HALF) + one
        _store_row(
            row, cell, table + one, weight_ptr, one == 0, eps,
            RANK, HALF, RANK_BLOCK, HALF_BLOCK, ROWS=1, IN_PLACE=True,
        )  # fmt: skip
    else:
        heads = ((part - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        x = q_ptr + token * q_stride + heads * q_head_stride + NOPE_DIM
        _turn(x, x, table + 0 * heads, heads < NUM_HEADS, HALF, HALF_BLOCK, HEADS)


@Kernel
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _absorb_kernel(
    q_ptr,
    row_ptr,
    weight_ptr,
    table_ptr,
    positions_ptr,
    pages_ptr,
    rows_ptr,
    up_ptr,
    out_ptr,
    num_tokens,
    q_stride,
    q_head_stride,
    row_stride,
    up_head_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out: [T, NUM_HEADS, RANK + 2 HALF]; up: [NUM_HEADS, at least NOPE_DIM, RANK]."""
    ROW: tl.constexpr = RANK + 2 * HALF
    head, part = tl.program_id(0), tl.program_id(1)
    features = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    inputs = tl.arange(0, NOPE_BLOCK)
    weights = tl.load(  # of the model, so they need not wait
        up_ptr + tl.minimum(head, NUM_HEADS - 1).to(tl.int64) * up_head_stride + inputs[:, None] * RANK + features,
        mask=(inputs[:, None] < NOPE_DIM) & (features < RANK),
        other=0.0,
    )
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tokens = (tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    present = tokens < num_tokens
    if head < NUM_HEADS:
        q = q_ptr + tokens * q_stride + head * q_head_stride
        x = tl.load(q + inputs[None, :], mask=present & (inputs[None, :] < NOPE_DIM), other=0.0)
        out = out_ptr + (tokens * NUM_HEADS + head) * ROW
        absorbed = tl.dot(x, weights, input_precision="ieee")
        tl.store(out + features, absorbed.to(x.dtype), mask=present & (features < RANK))
        if part == 0:
            table = table_ptr + tl.load(positions_ptr + tokens, mask=present, other=0) * (2 * HALF)
            _turn(q + NOPE_DIM, out + RANK, table, present, HALF, HALF_BLOCK, BLOCK_TOKENS)
    else:
        local = part * ROWS + tl.arange(0, ROWS)
        mine = (tl.program_id(2) * BLOCK_TOKENS + local).to(tl.int64)[:, None]
        known = (local < BLOCK_TOKENS)[:, None] & (mine < num_tokens)
        row = row_ptr + mine * row_stride
        cell = pages_ptr + tl.load(rows_ptr + mine, mask=known, other=0) * ROW
        angles = table_ptr + tl.load(positions_ptr + mine, mask=known, other=0) * (2 * HALF)
        _store_row(
            row, cell, angles, weight_ptr, known, eps,
            RANK, HALF, RANK_BLOCK, HALF_BLOCK, ROWS, IN_PLACE=False,
        )  # fmt: skip


class TritonRows:
    """See `LatentRows`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def store(self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor) -> None:
        """See `LatentRows`."""
        _check(q, row, pages)
        num_tokens, num_heads, width = q.shape
        half = rotation.table.shape[1] // 2
        heads = min(16, next_power_of_2(num_heads))
        _store_kernel[(num_tokens, 1 + cdiv(num_heads, heads))](
            q,
            row,
            norm.weight,
            rotation.table,
            rotation.positions,
            pages,
            rows,
            q.stride(0),
            q.stride(1),
            row.stride(0),
            norm.eps,
            NUM_HEADS=num_heads,
            NOPE_DIM=width - 2 * half,
            RANK=len(norm.weight),
            HALF=half,
            HEADS=heads,
            RANK_BLOCK=next_power_of_2(len(norm.weight)),
            HALF_BLOCK=next_power_of_2(half),
            num_warps=2,
            **early_launch(q.device),
        )

    def absorb(
        self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor, up: Tensor
    ) -> Tensor:
        """See `LatentRows`."""
        _check(q, row, pages)
        assert up[0].is_contiguous()
        num_tokens, num_heads, width = q.shape
        half, rank = rotation.table.shape[1] // 2, len(norm.weight)
        out = q.new_empty(num_tokens, num_heads, rank + 2 * half)
        block_tokens = _block_tokens(num_tokens, num_heads)
        num_parts = cdiv(rank, _BLOCK_FEATURES)
        _absorb_kernel[(num_heads + 1, num_parts, cdiv(num_tokens, block_tokens))](
            q,
            row,
            norm.weight,
            rotation.table,
            rotation.positions,
            pages,
            rows,
            up,
            out,
            num_tokens,
            q.stride(0),
            q.stride(1),
            row.stride(0),
            up.stride(0),
            norm.eps,
            NUM_HEADS=num_heads,
            NOPE_DIM=width - 2 * half,
            RANK=rank,
            HALF=half,
            NOPE_BLOCK=max(16, next_power_of_2(width - 2 * half)),
            RANK_BLOCK=next_power_of_2(rank),
            HALF_BLOCK=next_power_of_2(half),
            BLOCK=_BLOCK_FEATURES,
            BLOCK_TOKENS=block_tokens,
            ROWS=next_power_of_2(cdiv(block_tokens, num_parts)),
            **early_launch(q.device),
        )
        return out


def _block_tokens(num_tokens: int, num_heads: int) -> int:
    """Tokens of a program that absorbs: the best of a search on an H200, for 16 and 128 heads."""
    if num_tokens <= 16:  # the least that the matrix units take
        return 16
    return 64 if num_tokens * num_heads >= 8192 else 32


def _check(q: Tensor, row: Tensor, pages: Tensor) -> None:
    assert q.stride(2) == row.stride(1) == 1, "features must be adjacent"
    assert pages.is_contiguous()


ROWS = TritonRows()
