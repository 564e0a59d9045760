"""Paged attention on a CPU by kernels of our own: pages are read where they lie; see `ops.native`.

Queries run in blocks that read the same keys: those of neighbouring tokens of a prompt, and those of rows that share a
prefix. What a query becomes does not depend on its block, and so not on the rest of a batch.
"""

import ctypes
from collections.abc import Iterator
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows
from hornbeam.ops.native.loader import load_library, needs_library
from hornbeam.ops.query import OpQuery

_LANES = 16  # floats of a vector, and keys that are seen at a time
_MOST_QUERIES = 32  # heads that share keys, times tokens: of a block
_LARGEST_HEAD = 256

_Integers = npt.NDArray[np.int32]


class _Plan(ctypes.Structure):
    """`struct attention` of attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("page_tables", "block_ends", "common", "tokens", "slots", "lens")),
        *((name, c_int64) for name in ("table_len", "blocks", "heads", "kv_heads", "size", "page_size", "window")),
        ("scale", c_float),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Queries, block by block."""

    tokens: _Integers  # of each query: its row in the step's tensors
    slots: _Integers
    lens: _Integers  # keys up to the query's own
    ends: _Integers  # of each block: where it ends
    common: _Integers  # of each block: keys that its first query's table holds for all


class NativeAttention:
    """See `Attention`. Plans are values, so lanes have nothing to share."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._block_tokens = _MOST_QUERIES * shape.num_kv_heads // shape.num_heads

    def plan_decode(self, rows: Rows) -> Attend:
        """See `Attention`."""
        if not rows.shared:
            return self.plan_prefill(rows)
        assert set(rows.query_lens) == {1}
        alone = set(range(len(rows.query_lens))).difference(*(shared.rows for shared in rows.shared))
        lens = rows.lens.tolist()
        members = [(list(shared.rows), shared.num_tokens // _LANES * _LANES) for shared in rows.shared]
        members += [([row], lens[row]) for row in sorted(alone)]
        order = np.array([row for block, _ in members for row in block], dtype=np.int32)
        sizes, common = [], []
        for block, num_tokens in members:
            parts = [len(part) for part in _parts(len(block), self._block_tokens)]
            sizes += parts
            common += [num_tokens] * len(parts)
        blocks = _Blocks(
            tokens=order,
            slots=rows.slots.numpy().astype(np.int32)[order],
            lens=rows.lens.numpy()[order],
            ends=np.cumsum(sizes, dtype=np.int32),
            common=np.array(common, dtype=np.int32),
        )
        return _NativeAttend(self._shape, rows.page_tables, blocks)

    def plan_prefill(self, rows: Rows) -> Attend:
        """See `Attention`. The queries of a block are neighbours, and the last of them sees what all see."""
        assert not rows.captured, "there are no graphs on a CPU"
        counts = np.array(rows.query_lens, dtype=np.int32)
        row_ends = np.cumsum(counts, dtype=np.int32)
        tokens = np.arange(row_ends[-1], dtype=np.int32)
        lens = tokens + 1 + np.repeat(rows.lens.numpy() - row_ends, counts)
        firsts = row_ends - counts
        ends = [
            first + part.stop
            for first, count in zip(firsts.tolist(), rows.query_lens, strict=True)
            for part in _parts(count, self._block_tokens)
        ]
        blocks = _Blocks(
            tokens=tokens,
            slots=np.repeat(rows.slots.numpy().astype(np.int32), counts),
            lens=lens.astype(np.int32),
            ends=np.array(ends, dtype=np.int32),
            common=lens[np.array(ends) - 1].astype(np.int32),
        )
        return _NativeAttend(self._shape, rows.page_tables, blocks)


def _parts(count: int, size: int) -> Iterator[range]:
    """0 .. count in stretches of at most `size`."""
    return (range(begin, min(begin + size, count)) for begin in range(0, count, size))


class _NativeAttend:
    """See `Attend`."""

    def __init__(self, shape: AttentionShape, page_tables: Tensor, blocks: _Blocks) -> None:
        self._attend = load_library().hornbeam_attend
        self._kept = page_tables, blocks  # the plan points into them
        self._plan = _Plan(
            page_tables=page_tables.data_ptr(),
            block_ends=blocks.ends.ctypes.data,
            common=blocks.common.ctypes.data,
            tokens=blocks.tokens.ctypes.data,
            slots=blocks.slots.ctypes.data,
            lens=blocks.lens.ctypes.data,
            table_len=page_tables.shape[1],
            blocks=len(blocks.ends),
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            size=shape.head_dim,
            page_size=shape.page_size,
            window=shape.window or 0,
            scale=shape.scale,
        )

    def __call__(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `Attend`."""
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        out = q.new_empty(q.shape) if out is None else out
        sinks_address = None if sinks is None else sinks.data_ptr()
        pages = k_pages.data_ptr(), v_pages.data_ptr()
        self._attend(ctypes.addressof(self._plan), q.data_ptr(), q.stride(0), *pages, sinks_address, out.data_ptr())
        return out


class NativeBackend:
    """See `AttentionBackend`."""

    captures = False
    captures_prefill = False
    least_shared = 64  # tokens; sharing costs nothing but the order of work

    def supports(self, query: OpQuery) -> str | None:
        """CPUs, for heads of whole vectors without soft caps."""
        if query.soft_cap:
            return "soft caps are not implemented"
        if query.head_dim % _LANES or query.head_dim > _LARGEST_HEAD:
            return f"needs heads of a multiple of {_LANES} features, and at most {_LARGEST_HEAD}"
        if query.num_heads > _MOST_QUERIES * query.num_kv_heads:
            return f"at most {_MOST_QUERIES} query heads can share keys"
        return needs_library(query)

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return NativeAttention(shape)


BACKEND = NativeBackend()
