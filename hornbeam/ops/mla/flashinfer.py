"""Latent attention by FlashInfer (Ye et al., 2025), for the modules that are compiled ahead of time.

Absorbed attention, of decode and of prefill, is FlashInfer's for Hopper; expanded prefill takes FlashAttention-3 where
its module for such heads is there, else Triton. Plans are made on the host from upper bounds of lengths, without
waiting for the device, and the kernel masks by these: they must be exact. Which pages a row has is filled in on the
device. One wrapper serves the decode of all batch sizes, captured or not: a plan lies at fixed addresses.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from flashinfer.jit import JitSpec
from flashinfer.jit.attention import gen_batch_mla_module, gen_batch_prefill_module
from flashinfer.mla import BatchMLAPagedAttentionWrapper
from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper
from torch import Tensor

from hornbeam.ops.attention.contract import Attention, AttentionShape, LatentAttend, Rows
from hornbeam.ops.attention.page_lists import PageLists
from hornbeam.ops.device import needs_cuda
from hornbeam.ops.mla.contract import Ragged, RaggedAttend, Stretch
from hornbeam.ops.mla.prefill import LatentPrefill, values_of
from hornbeam.ops.mla.triton_ragged import TritonRagged, merge
from hornbeam.ops.query import OpQuery

_DTYPES = ("bfloat16", "float16")
_TILE = 128  # packed queries of the largest tile of absorbed attention
_MOST_TILES = 2**14 - 256  # of an absorbed plan, which does not check its 2**14; some are cut in two or more
_RAGGED_PLAN_BYTES = 2**22  # enough for 128 heads of 2**16 tokens of 500 rows


class FlashInferRagged:
    """See `Ragged`. A step's stretches have a wrapper each, since each holds one plan."""

    def __init__(self, shape: AttentionShape) -> None:
        assert shape.latent is not None
        self._shape = shape
        self._sizes = shape.latent
        self._scratch = torch.zeros(1024, dtype=torch.uint8, device=shape.device)  # it needs none, but wants some
        self._wrappers: list[BatchPrefillWithRaggedKVCacheWrapper] = []

    def plan(self, stretches: Sequence[Stretch]) -> Sequence[RaggedAttend]:
        """See `Ragged`."""
        while len(self._wrappers) < len(stretches):
            wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._scratch, "NHD", backend="fa3")
            plan_buffer = torch.empty(_RAGGED_PLAN_BYTES, dtype=torch.uint8, device=self._shape.device)
            wrapper.reset_workspace_buffer(self._scratch, plan_buffer)  # in place of its own, of 8 MiB
            self._wrappers.append(wrapper)
        return [self._plan(*pair) for pair in zip(self._wrappers, stretches, strict=False)]

    def merge(self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        """See `Ragged`."""
        merge(out, lse, other, other_lse)

    def _plan(self, wrapper: BatchPrefillWithRaggedKVCacheWrapper, stretch: Stretch) -> RaggedAttend:
        shape, sizes = self._shape, self._sizes
        wrapper.plan(
            _begins(stretch.query_lens),
            _begins(stretch.key_lens),
            shape.num_heads,
            shape.num_heads,
            sizes.nope_dim + sizes.rope_dim,
            head_dim_vo=sizes.value_dim,
            causal=stretch.causal,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            sm_scale=shape.scale,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = wrapper.run(q, k, v, return_lse=True)
            return out, lse

        return attend


class FlashInferLatentAttention:
    """The wrappers of one lane, their staging memory and the buffers that they read."""

    def __init__(self, shape: AttentionShape, max_rows: int) -> None:
        assert shape.latent is not None
        self._shape = shape
        self._sizes = shape.latent
        num_processors = torch.cuda.get_device_properties(shape.device).multi_processor_count
        # Room for the parts of split rows, in the format of the result, and their log-sum-exps.
        scratch_bytes = 2 * num_processors * _TILE * (shape.dtype.itemsize * shape.latent.rank + 4) + 1024
        self._scratch = torch.zeros(scratch_bytes, dtype=torch.uint8, device=shape.device)
        self._decode, self._absorbed = (
            (BatchMLAPagedAttentionWrapper(self._scratch, backend="fa3"), PageLists(shape, max_rows)) for _ in range(2)
        )
        self._decode_attend = LatentAttend(absorbed=True, run=self._run(self._decode[0]))
        ragged: Ragged = FlashInferRagged(shape) if _ragged_is_compiled(shape) else TritonRagged(shape)
        most_absorbed = (_MOST_TILES - max_rows) * _TILE // shape.num_heads
        self._prefill = LatentPrefill(shape, ragged, self._plan_absorbed, most_absorbed)

    def plan_decode(self, rows: Rows) -> LatentAttend:
        """See `Attention`."""
        self._plan(*self._decode, rows, causal=rows.query_lens[0] > 1)
        return self._decode_attend

    def plan_prefill(self, rows: Rows) -> LatentAttend:
        """See `Attention`."""
        return self._prefill.plan(rows)

    def _plan_absorbed(self, rows: Rows) -> LatentAttend:
        self._plan(*self._absorbed, rows, causal=True)
        return LatentAttend(absorbed=True, run=self._run(self._absorbed[0]))

    def _plan(self, wrapper: BatchMLAPagedAttentionWrapper, pages: PageLists, rows: Rows, *, causal: bool) -> None:
        shape = self._shape
        indptr, _ = pages.bounds(rows.len_bounds)
        pages.indptr[: len(indptr)].copy_(indptr, non_blocking=True)
        pages.fill(rows)
        wrapper.plan(
            _begins(rows.query_lens),
            indptr,
            pages.indices,
            torch.tensor(rows.len_bounds, dtype=torch.int32),
            shape.num_heads,
            self._sizes.rank,
            self._sizes.rope_dim,
            shape.page_size,
            causal,
            shape.scale,
            shape.dtype,
            shape.dtype,
        )

    def _run(self, wrapper: BatchMLAPagedAttentionWrapper) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        rank = self._sizes.rank

        def run(q: Tensor, row: Tensor, pages: Tensor, up: Tensor) -> Tensor:
            latents = q.new_empty(*q.shape[:2], rank)
            cells = pages.squeeze(2)
            wrapper.run(q[..., :rank], q[..., rank:], cells[..., :rank], cells[..., rank:], out=latents)
            return values_of(latents, up, self._shape)

        return run


def _begins(lens: Sequence[int]) -> Tensor:
    """Where each row begins, and where the last one ends: [rows + 1] int32, on the host."""
    return torch.tensor(list(accumulate(lens, initial=0)), dtype=torch.int32)


def _ragged_is_compiled(shape: AttentionShape) -> bool:
    """Whether FlashInfer's package or the user's own cache holds FlashAttention-3 for the expanded heads."""
    assert shape.latent is not None
    key_dim = shape.latent.nope_dim + shape.latent.rope_dim
    no_positions, dtypes = 0, (shape.dtype, shape.dtype, shape.dtype, torch.int32)
    spec = gen_batch_prefill_module("fa3", *dtypes, key_dim, shape.latent.value_dim, no_positions, False, False, False)
    return bool(spec.is_compiled)


class FlashInferLatentBackend:
    """Half precision on Hopper, without anything to compile at start."""

    captures = True
    captures_prefill = False
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """Hopper, and sizes whose module is compiled."""
        if reason := needs_cuda(query):
            return reason
        if query.latent is None:
            return "serves latent attention alone"
        if query.dtype not in _DTYPES:
            return f"{query.dtype} is not among {', '.join(_DTYPES)}"
        if torch.cuda.get_device_capability() != (9, 0):
            return "needs a device of compute capability 9.0"
        dtype, sizes = getattr(torch, query.dtype), query.latent
        spec: JitSpec = gen_batch_mla_module("fa3", dtype, dtype, dtype, torch.int32, sizes.rank, sizes.rope_dim, False)
        if not spec.is_compiled:
            return (
                f"its module for {query.dtype} and rows of {sizes.rank} + {sizes.rope_dim} features would have to be "
                "compiled at start; install flashinfer-jit-cache to have it"
            )
        return None

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return FlashInferLatentAttention(shape, max_rows)


BACKEND = FlashInferLatentBackend()
