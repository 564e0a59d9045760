"""Paged attention by FlashInfer (Ye et al., 2025), for the modules that are compiled ahead of time.

Decode runs on tensor cores for every group size: it reads the cache once, and so is bound by memory all the same. Each
batch size has a wrapper in graph mode, captured or not, so that a step gives the same numbers either way. Prefill takes
FlashAttention-3 on Hopper where its module is there. Short chunks leave most of its tiles empty: they go to our own
kernel, which puts the heads of a group into one tile, or with few keys to FlashAttention-2, which does so, too, and
which also has graphs of few tokens, whose keys it splits over the whole device.

Plans are made on the host from upper bounds of lengths, without waiting for the device. Which pages and how many tokens
a row has is filled in on the device. A length that falls short of its bound by pages may cross a split of the plan,
which FlashInfer does not check: drafts will need bounds that are tight to a page.
"""

from collections.abc import Sequence

import numpy as np
import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)
from flashinfer.jit.attention import gen_batch_prefill_module
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows
from hornbeam.ops.attention.page_lists import PageLists
from hornbeam.ops.attention.triton import TiledPrefill
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.query import OpQuery

_HEAD_DIMS = (64, 128, 256)
_DTYPES = ("bfloat16", "float16")
_PREFILL_TILE = 128  # packed queries of FlashAttention-2's largest tile, and queries of FlashAttention-3's
_MOST_PADDED = 1.3  # queries of FlashAttention-3's tiles per real one, beyond which others are faster, on an H200
_MANY_KEYS = 4  # per query of such chunks, from which ours is faster than FlashAttention-2
_LEAST_RECORDED = 256  # tokens of graphs from which FlashAttention-3 is faster, which does not split keys
_PLAN_BYTES_PER_ROW = 64  # of a decode plan; it takes less than half of it
_CAPTURED_PLAN_BYTES = 1 << 18  # twice what 3,072 queries of 30 chunks take with 64 heads
_LEAST_PREFILL_ROWS = 64  # room for recorded steps, which have more rows than there may be requests


class FlashInferAttention:
    """The wrappers of one lane, their staging memory and the buffers that they read."""

    def __init__(self, shape: AttentionShape, max_rows: int) -> None:
        self._shape = shape
        device = shape.device
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._scratch = torch.zeros(_scratch_bytes(shape, max_rows, num_processors), dtype=torch.uint8, device=device)
        plan_bytes = _PLAN_BYTES_PER_ROW * max(2 * max_rows, 2 * num_processors)
        self._plan_buffer = torch.empty(plan_bytes, dtype=torch.uint8, device=device)
        self._decode_pages = PageLists(shape, max_rows)
        self._prefill_pages = PageLists(shape, max(max_rows, _LEAST_PREFILL_ROWS))
        self._no_indices = torch.empty(0, dtype=torch.int32, device=device)
        self._decodes: dict[int, tuple[BatchDecodeWithPagedKVCacheWrapper, Attend]] = {}
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        fa3 = hopper and _is_compiled("fa3", shape.dtype, shape.head_dim, shape.window, shape.soft_cap)
        self._backend = backend = "fa3" if fa3 else "fa2"
        # Of pages and keys that are not in the window FlashInfer is not told; the window's first page it masks itself.
        self._masks = {"window_left": (shape.window or 0) - 1, "logits_soft_cap": shape.soft_cap}
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(self._scratch, "NHD", backend=backend)
        self._short: BatchPrefillWithPagedKVCacheWrapper | None = None  # for chunks that fill no tile
        if fa3:
            self._short = BatchPrefillWithPagedKVCacheWrapper(self._scratch, "NHD", backend="fa2")
        self._short_behind_many = TiledPrefill(shape, num_processors)
        self._prompts = BatchPrefillWithRaggedKVCacheWrapper(self._scratch, "NHD", backend=backend)
        self._captured_prefills: dict[int, tuple[BatchPrefillWithPagedKVCacheWrapper, Attend]] = {}  # by queries
        self._captured_scratch = self._scratch
        self._captured_plan = torch.empty(_CAPTURED_PLAN_BYTES, dtype=torch.uint8, device=device)

    def plan_decode(self, rows: Rows) -> Attend:
        """See `Attention`."""
        assert max(rows.query_lens) == 1, "several queries per row are a prefill to FlashInfer"
        num_rows, shape = len(rows.query_lens), self._shape
        if num_rows not in self._decodes:
            self._decodes[num_rows] = self._make_decode(num_rows)
        wrapper, attend = self._decodes[num_rows]
        len_bounds: Sequence[int] | np.ndarray = rows.len_bounds
        skips = None
        if shape.window is not None:
            len_bounds, skips = self._decode_pages.window(rows)
        indptr, last_page_lens = self._decode_pages.bounds(len_bounds)
        wrapper.plan(
            indptr,
            self._no_indices,  # filled in below
            last_page_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=shape.scale,
            **self._masks,
            # Only the maximum is taken, and only for other kernels than this one: not worth a loop over all rows.
            seq_lens=torch.ones(1, dtype=torch.int32),
        )
        self._decode_pages.fill(rows, skips)
        return attend

    def plan_prefill(self, rows: Rows) -> Attend:
        """See `Attention`. The bounds of prompts are exact."""
        begins = np.zeros(len(rows.query_lens) + 1, dtype=np.int32)
        np.cumsum(rows.query_lens, out=begins[1:])
        query_begins, num_queries = torch.from_numpy(begins), int(begins[-1])
        if rows.captured:
            if num_queries not in self._captured_prefills:
                self._captured_prefills[num_queries] = self._make_captured_prefill(num_queries, len(rows.query_lens))
            wrapper, attend = self._captured_prefills[num_queries]
            self._plan_pages(wrapper, rows, query_begins)
            return attend
        wrapper = self._prefill
        if self._short is not None and _wastes_tiles(rows):
            if sum(rows.len_bounds) >= _MANY_KEYS * num_queries:
                return self._short_behind_many.plan(rows)
            wrapper = self._short
        elif rows.fresh and list(rows.len_bounds) == list(rows.query_lens):
            return self._plan_prompts(query_begins)
        self._plan_pages(wrapper, rows, query_begins)
        return _attend_pages(wrapper)

    def _plan_pages(self, wrapper: BatchPrefillWithPagedKVCacheWrapper, rows: Rows, query_begins: Tensor) -> None:
        """Queries that read their keys and values from pages; `query_begins` [B + 1] int32, on the host."""
        shape, pages = self._shape, self._prefill_pages
        len_bounds: Sequence[int] | np.ndarray = rows.len_bounds
        skips = None
        if shape.window is not None:
            len_bounds, skips = pages.window(rows)
        indptr, last_page_lens = pages.bounds(len_bounds)
        pages.indptr[: len(indptr)].copy_(indptr, non_blocking=True)
        wrapper.plan(
            query_begins,
            indptr,
            self._no_indices if rows.captured else pages.indices,
            last_page_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=shape.scale,
            **self._masks,
            seq_lens=torch.from_numpy(np.array(len_bounds, dtype=np.int32)),
            max_token_per_sequence=max(rows.query_lens),
        )
        pages.fill(rows, skips)

    def _plan_prompts(self, indptr: Tensor) -> Attend:
        """Prompts with nothing before them: their keys and values are read where they were made, which is faster."""
        shape = self._shape
        self._prompts.plan(
            indptr,
            indptr,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=shape.scale,
            **self._masks,
        )

        def attend(
            q: Tensor,
            k_pages: Tensor,
            v_pages: Tensor,
            sinks: Tensor | None = None,
            fresh: Fresh | None = None,
            out: Tensor | None = None,
        ) -> Tensor:
            assert fresh is not None, "planned for keys and values that are given"
            result: Tensor = self._prompts.run(q, *fresh, out=out)
            return result

        return attend

    def _make_decode(self, num_rows: int) -> tuple[BatchDecodeWithPagedKVCacheWrapper, Attend]:
        pages = self._decode_pages
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._scratch,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=pages.indptr[: num_rows + 1],
            paged_kv_indices_buffer=pages.indices,
            paged_kv_last_page_len_buffer=pages.last_page_lens[:num_rows],
            backend="fa2",
        )
        # Its own buffers of 8 MiB go back: a lane plans one step at a time, so all its wrappers can share a small one.
        wrapper.reset_workspace_buffer(self._scratch, self._plan_buffer)
        attend_pages, lens = _attend_pages(wrapper), pages.last_page_lens[:num_rows, None, None]

        def attend(
            q: Tensor,
            k_pages: Tensor,
            v_pages: Tensor,
            sinks: Tensor | None = None,
            fresh: Fresh | None = None,
            out: Tensor | None = None,
        ) -> Tensor:
            decoded = attend_pages(q, k_pages, v_pages)
            return decoded if out is None else torch.where(lens > 0, decoded, out, out=out)

        return wrapper, attend

    def _make_captured_prefill(
        self, num_queries: int, num_rows: int
    ) -> tuple[BatchPrefillWithPagedKVCacheWrapper, Attend]:
        shape, pages = self._shape, self._prefill_pages
        needed = _captured_scratch_bytes(shape, num_queries, num_rows)
        if needed > len(self._captured_scratch):
            self._captured_scratch = torch.zeros(needed, dtype=torch.uint8, device=shape.device)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            self._captured_scratch,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=torch.zeros(num_rows + 1, dtype=torch.int32, device=shape.device),
            paged_kv_indptr_buf=pages.indptr[: num_rows + 1],
            paged_kv_indices_buf=pages.indices,
            paged_kv_last_page_len_buf=pages.last_page_lens[:num_rows],
            backend=self._backend if num_queries >= _LEAST_RECORDED else "fa2",
        )
        wrapper.reset_workspace_buffer(self._captured_scratch, self._captured_plan)  # as in `_make_decode`
        return wrapper, _attend_pages(wrapper)


def _attend_pages(wrapper: BatchPrefillWithPagedKVCacheWrapper | BatchDecodeWithPagedKVCacheWrapper) -> Attend:
    """What `wrapper` has planned, or will have when a graph is replayed."""

    def attend(
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        # Without one to write to, prefill would fill it with zeros.
        out = q.new_empty(q.shape) if out is None else out
        result: Tensor = wrapper.run(q, (k_pages, v_pages), out=out)
        return result

    return attend


def _wastes_tiles(rows: Rows) -> bool:
    """Whether chunks are so short that FlashAttention-3 is slower, whose tiles are padded queries of one head."""
    num_queries, num_keys = np.array(rows.query_lens), np.array(rows.len_bounds)
    padded = -(-num_queries // _PREFILL_TILE) * _PREFILL_TILE
    return bool(padded @ num_keys > _MOST_PADDED * (num_queries @ num_keys))


def _captured_scratch_bytes(shape: AttentionShape, num_queries: int, num_rows: int) -> int:
    """Room for the float32 parts of a recorded prefill: FlashInfer reserves a tile for whatever rows may come."""
    group = shape.num_heads // shape.num_kv_heads
    num_tiles = -(-num_queries * group // _PREFILL_TILE) + num_rows - 1
    return shape.num_heads * num_tiles * _PREFILL_TILE * (shape.head_dim + 1) * 4 + 1024


def _scratch_bytes(shape: AttentionShape, max_rows: int, num_processors: int) -> int:
    """Room for the float32 parts of split rows: FlashInfer splits until two tiles per processor are busy."""
    group = shape.num_heads // shape.num_kv_heads
    split_tiles = 2 * num_processors // shape.num_kv_heads
    decode_tile = next(size for size in (16, 64, _PREFILL_TILE) if group <= size or size == _PREFILL_TILE)
    decode_tiles = max(split_tiles, max_rows + -(-max_rows * group // decode_tile))
    packed_queries = max(decode_tiles * decode_tile, split_tiles * _PREFILL_TILE)
    return shape.num_heads * packed_queries * (shape.head_dim + 1) * 4 + 1024


def _is_compiled(backend: str, dtype: torch.dtype, head_dim: int, window: int | None, soft_cap: float | None) -> bool:
    """Whether FlashInfer's package or the user's own cache holds the module."""
    no_positions, half_precision_products = 0, False
    spec = gen_batch_prefill_module(
        backend,
        dtype,
        dtype,
        dtype,
        torch.int32,
        head_dim,
        head_dim,
        no_positions,
        window is not None,
        soft_cap is not None,
        half_precision_products,
    )
    return bool(spec.is_compiled)


class FlashInferBackend:
    """Half precision over head sizes 64, 128 and 256, without anything to compile at start."""

    captures = True
    captures_prefill = True
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices, and parameters whose FlashAttention-2 module is compiled."""
        if reason := needs_cuda(query):
            return reason
        if query.sinks:
            return "attention sinks are not implemented"
        if query.dtype not in _DTYPES:
            return f"{query.dtype} is not among {', '.join(_DTYPES)}"
        if query.head_dim not in _HEAD_DIMS:
            return f"head size {query.head_dim} is not among {', '.join(map(str, _HEAD_DIMS))}"
        module = getattr(torch, query.dtype), query.head_dim
        # Beside layers with a window there may be some without.
        if not all(_is_compiled("fa2", *module, window, query.soft_cap) for window in {query.window, None}):
            return (
                f"its modules for {query.dtype}, head size {query.head_dim}, window {query.window} and soft cap "
                f"{query.soft_cap} would have to be compiled at start; install flashinfer-jit-cache to have them"
            )
        return None

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return FlashInferAttention(shape, max_rows)


BACKEND = FlashInferBackend()
