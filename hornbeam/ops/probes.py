"""The smallest real use of each op, by which a backend that promises more than it keeps is found out at start.

A probe runs its op on zeros, in the ways and with the sizes of the model for which kernels are compiled, and raises
what the backend raises. Results are not compared: that is what tests are for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hornbeam.core.family import LatentSizes, MixtureShape
from hornbeam.core.fp8 import Fp8Format
from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.activation.contract import Activation
from hornbeam.ops.ahead import WithheldLaunches, side_by_side
from hornbeam.ops.attention.contract import AttentionBackend, AttentionShape, LatentAttend, Rows
from hornbeam.ops.device import num_multiprocessors
from hornbeam.ops.layout.contract import Layout, PlannedTokens, SlotTables, StepTokens
from hornbeam.ops.linear.contract import SCALE_BLOCK, Fp8Product, Fp8Weight, InputNorm, LinearProduct
from hornbeam.ops.mla.contract import LatentRows
from hornbeam.ops.moe.contract import ExpertsBackend, ExpertsShape, ExpertWeights, GatedUnit, Routing, RoutingRule
from hornbeam.ops.norm.contract import PART_COUNTS, Norm
from hornbeam.ops.qkv.contract import HeadNorms, Qkv, Rotation
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import Limits, Sample

_MAX_PAGES = 16  # of the page table: kernels are compiled for strides of it that 16 divides, as it divides real ones


class Probes:
    """One per op, for the device and sizes of `query`."""

    def __init__(self, query: OpQuery) -> None:
        self._query = query
        self._size = query.num_heads * query.head_dim
        self._device = torch.device(query.device)
        self._zeros = partial(torch.zeros, dtype=getattr(torch, query.dtype), device=self._device)

    def activation(self, backend: Activation) -> None:
        """One token, each way; of dense models the product of a long prompt, with few features."""
        x = self._zeros(1, 2 * self._size)
        uses: list[Callable[[], object]] = [
            partial(self._run, [partial(backend.silu_mul, x), partial(backend.gelu_tanh_mul, x)])
        ]
        if self._query.mixture is None and not self._query.fp8:
            prompt, weight = self._zeros(8192, 64), self._zeros(6 * self._query.hidden_size, 64)
            uses.append(partial(backend.silu_mul_product, prompt, weight))
        side_by_side(uses, self._device)
        self._wait()

    def decode_attention(self, backend: AttentionBackend) -> None:
        """A row that decodes, two of them, two that share a page if they can."""
        query = self._query
        row, pair = self._attention_rows(1, 1), self._attention_rows(1, query.page_size + 1, num_rows=2)
        steps = [row, pair]
        if backend.least_shared is not None and query.window is None and query.soft_cap is None:
            steps.append(replace(pair, shared=(SharedPrefix(rows=(0, 1), num_tokens=query.page_size),)))
        self._attention(backend, steps, prefill=False)

    def prefill_attention(self, backend: AttentionBackend) -> None:
        """A row with two queries, which see few keys and many, and so many such rows that no one's keys are split."""
        many = _MAX_PAGES * self._query.page_size
        shapes = (2, 1), (many, 1), (many, num_multiprocessors(self._device) + 1)
        steps = [self._attention_rows(2, length, num_rows=num_rows) for length, num_rows in shapes]
        self._attention(backend, steps, prefill=True)

    def _attention(self, backend: AttentionBackend, steps: list[Rows], *, prefill: bool) -> None:
        plans = [partial(self._planned, backend, rows, prefill=prefill) for rows in steps]
        self._run(side_by_side(plans, self._device))

    def _planned(self, backend: AttentionBackend, rows: Rows, *, prefill: bool) -> Callable[[], object]:
        """Attention over zeros."""
        query = self._query
        attention, pages = backend.create(self._attention_shape(), max_rows=max(2, len(rows.query_lens))), self._pages()
        attend = (attention.plan_prefill if prefill else attention.plan_decode)(rows)
        assert not isinstance(attend, LatentAttend)
        sinks = self._zeros(query.num_heads) if query.sinks else None
        q = self._zeros(sum(rows.query_lens), query.num_heads, query.head_dim)
        return partial(attend, q, pages, pages, sinks)

    def latent_attention(self, backend: AttentionBackend, *, prefill: bool = True) -> None:
        """A row that decodes; with `prefill` a prompt of two tokens, two after many, and many after one."""
        query, sizes = self._query, self._latent()
        attention, pages = backend.create(self._attention_shape(), max_rows=1), self._pages()
        up = self._zeros(query.num_heads, sizes.nope_dim + sizes.value_dim, sizes.rank)
        most = _MAX_PAGES * query.page_size
        prefills = ((2, 2), (2, most), (most - 1, most)) if prefill else ()
        for plan, num_queries, length in (
            (attention.plan_decode, 1, 1),
            *((attention.plan_prefill, *lens) for lens in prefills),
        ):
            attend = plan(self._attention_rows(num_queries, length))
            assert isinstance(attend, LatentAttend)
            width = query.head_dim if attend.absorbed else sizes.nope_dim + sizes.rope_dim
            q, row = self._zeros(num_queries, query.num_heads, width), self._zeros(num_queries, query.head_dim)
            attend.run(q, row, pages, up)
        self._wait()

    def _attention_shape(self) -> AttentionShape:
        query = self._query
        return AttentionShape(
            num_heads=query.num_heads,
            num_kv_heads=query.num_kv_heads,
            head_dim=query.head_dim,
            page_size=query.page_size,
            max_pages=_MAX_PAGES,
            scale=1.0,
            window=query.window,
            soft_cap=query.soft_cap,
            latent=query.latent,
            dtype=getattr(torch, query.dtype),
            device=self._device,
        )

    def _attention_rows(self, num_queries: int, length: int, *, num_rows: int = 1) -> Rows:
        return Rows(
            page_tables=self._integers(2, _MAX_PAGES, dtype=torch.int32),
            slots=self._integers(num_rows),
            lens=self._integers(num_rows, dtype=torch.int32) + length,
            len_bounds=(length,) * num_rows,
            query_lens=(num_queries,) * num_rows,
        )

    def experts(self, backend: ExpertsBackend) -> None:
        """Few tokens and many, which take the first expert with all their slots: no other has weights."""
        mixture, hidden = self._mixture(), self._query.hidden_size
        zeros, inner = self._zeros, mixture.intermediate_size
        shape = ExpertsShape(
            num_experts=mixture.num_experts,
            top_k=mixture.top_k,
            hidden_size=hidden,
            intermediate_size=inner,
            unit=GatedUnit(),
            fp8=Fp8Format() if self._query.fp8 else None,
            dtype=getattr(torch, self._query.dtype),
            device=self._device,
        )
        weights = ExpertWeights(gate_up=zeros(1, 2 * inner, hidden), down=zeros(1, hidden, inner))
        if self._query.fp8:
            gate_up, down = self._blocks(1, 2 * inner, hidden), self._blocks(1, hidden, inner)
            weights = ExpertWeights(gate_up=gate_up[0], down=down[0], gate_up_scales=gate_up[1], down_scales=down[1])
        compute = backend.create(shape)
        for num_tokens in (2, 32):
            ids = self._integers(num_tokens, mixture.top_k, dtype=torch.int32)
            compute(zeros(num_tokens, hidden), torch.ones(ids.shape, device=self._device), ids, weights)
        self._wait()

    def routing(self, backend: Routing) -> None:
        """One token."""
        mixture = self._mixture()
        backend.route(self._zeros(1, mixture.num_experts), RoutingRule(top_k=mixture.top_k, renormalize=True))
        self._wait()

    def latent_rows(self, backend: LatentRows) -> None:
        """Few tokens and many, each way."""
        query, sizes = self._query, self._latent()
        norm = InputNorm(weight=self._zeros(sizes.rank), eps=1e-6)
        up = self._zeros(query.num_heads, sizes.nope_dim + sizes.value_dim, sizes.rank)
        for num_tokens in (1, 32, 1024):
            zero, row = self._integers(num_tokens), self._zeros(num_tokens, query.head_dim)
            rotation = Rotation(table=torch.zeros(1, sizes.rope_dim, device=self._device), positions=zero)
            q = self._zeros(num_tokens, query.num_heads, sizes.nope_dim + sizes.rope_dim)
            backend.store(q, row, norm, rotation, self._pages(), zero)
            backend.absorb(q, row, norm, rotation, self._pages(), zero, up)
        self._wait()

    def layout(self, backend: Layout) -> None:
        """One token."""
        zero, zeros = self._integers(1), self._integers(1, 1)
        tables = SlotTables(
            lens=self._integers(2),
            last_ids=self._integers(2),
            page_tables=self._integers(1, 2, _MAX_PAGES, dtype=torch.int32),
            page_size=self._query.page_size,
        )
        integers = {name: self._integers(1) for name in ("slots", "ids", "positions", "decode_slots")}
        lens = self._integers(1, dtype=torch.int32)
        planned = PlannedTokens(num_decode=1, slots=zero, ids=zero[1:], positions=zero[1:], entries=zero, pages=zero)
        backend.lay_out(planned, tables, StepTokens(**integers, cache_rows=zeros, decode_lens=lens))
        self._wait()

    def linear(self, backend: LinearProduct) -> None:
        """One row and two."""
        weight = self._zeros(16, self._size)
        self._run([partial(backend.linear, self._zeros(num_rows, self._size), weight, None) for num_rows in (1, 2)])

    def fp8_linear(self, backend: Fp8Product) -> None:
        """One row and two."""
        values, scales = self._blocks(SCALE_BLOCK, self._size)
        weight = Fp8Weight(values=values, scales=scales, power_of_two=False)
        self._run([partial(backend.linear, self._zeros(num_rows, self._size), weight, None) for num_rows in (1, 2)])

    def norm(self, backend: Norm) -> None:
        """One token, with and without a residual, whole and in parts."""
        size = self._query.hidden_size or self._size
        x, weight = self._zeros(1, size), self._zeros(size)
        added = x, *(x.float().repeat(num_parts, 1, 1) for num_parts in PART_COUNTS)
        adds = [partial(backend.add_rms_norm, part, self._zeros(1, size), weight, 1e-6) for part in added]
        self._run([partial(backend.rms_norm, x, weight, 1e-6), *adds])

    def qkv(self, backend: Qkv) -> None:
        """One token, normalised and rotated."""
        query = self._query
        q, k = self._zeros(1, query.num_heads, query.head_dim), self._zeros(1, query.num_kv_heads, query.head_dim)
        weight, zero = self._zeros(query.head_dim), self._integers(1)
        table = torch.zeros(1, query.head_dim, device=self._device)
        norms = HeadNorms(query=weight, key=weight, eps=1e-6)
        rotation = Rotation(table=table, positions=zero)
        backend.store(q, k, k, norms, rotation, self._pages(), self._pages(), zero)
        self._wait()

    def sample(self, backend: Sample) -> None:
        """One row, with everything that requests may ask for, and with nothing."""
        size, ones, zeros = self._query.vocab_size, torch.ones(1, device=self._device), self._integers(1)
        logits, counts = self._zeros(1, size), self._integers(1, size, dtype=torch.int32)
        limits = Limits(top_ks=zeros + 1, top_ps=ones / 2, min_ps=ones / 2)
        uses: list[Callable[[], object]] = [
            partial(backend.penalize, logits, zeros, counts, ones, ones, ones),
            partial(backend.logprobs, logits, self._integers(1, 1), 1),
        ]
        of_rows = zeros, zeros.int(), ones, zeros, self._integers(1)
        for scores in (logits, logits.float()):  # penalties and biases make them float32
            uses += [partial(backend.sample, scores, *of_rows, asked) for asked in (None, limits)]
        self._run(uses)

    def _run(self, uses: Sequence[Callable[[], object]]) -> None:
        """What `uses` launch is compiled side by side first. None of their kernels goes where another's values say."""
        launches = WithheldLaunches(self._device)
        with launches.withhold():
            for use in uses:
                use()
        launches.compile()
        for use in uses:
            use()
        self._wait()

    def _blocks(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Values and scales of an eight-bit weight."""
        blocks = (-(-size // SCALE_BLOCK) for size in shape[-2:])
        values = torch.zeros(shape, dtype=torch.float8_e4m3fn, device=self._device)
        return values, torch.ones(*shape[:-2], *blocks, device=self._device)

    def _latent(self) -> LatentSizes:
        assert self._query.latent is not None
        return self._query.latent

    def _mixture(self) -> MixtureShape:
        assert self._query.mixture is not None
        return self._query.mixture

    def _pages(self) -> Tensor:
        return self._zeros(1, self._query.page_size, self._query.num_kv_heads, self._query.head_dim)

    def _integers(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _wait(self) -> None:
        """A device tells of a failed kernel only when it is waited for."""
        torch.zeros(1, device=self._device).item()
