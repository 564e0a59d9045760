"""Paged attention on a CPU: rows of similar lengths run together, and a prefix that rows share is read once.

torch's fused CPU kernel takes dense keys, so the pages of a batch are gathered, padded to the longest row, and what is
no row's own is masked. The kernel also tells the log-sum-exp of the scores, with which parts are merged: those over a
shared prefix with those over what follows it, and the sinks, which are scores without a value.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows
from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery

_MOST_PADDED = 64  # rows with more queries run alone: they fill the kernel by themselves, and padding would cost


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """C rows that run together, with Q queries and W pages each, padding included."""

    tokens: Tensor | slice  # which of the step's queries, row by row: [C * Q], or all of a stretch
    num_queries: int  # Q
    pages: Tensor  # [C * W] int64
    num_pages: int  # W
    mask: Tensor | None  # [C, 1, Q, W * S] float32, 0 or -inf; None: every key is seen
    causal: bool  # queries and keys stand at the same positions, so no mask is needed
    valid: Tensor | None  # [T'] int64: which of the C * Q results are no padding; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefix:
    """Rows that share their first pages."""

    rows: Tensor  # [C] int64
    pages: Tensor  # [W] int64


class CpuAttention:
    """See `Attention`. Plans are values, so lanes have nothing to share."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def plan_decode(self, rows: Rows) -> Attend:
        """See `Attention`."""
        page_size = self._shape.page_size
        skipped = [0] * len(rows.slots)
        prefixes = []
        for shared in rows.shared or ():
            num_pages = shared.num_tokens // page_size
            pages = rows.page_tables[rows.slots[shared.rows[0]], :num_pages].long()
            prefixes.append(_Prefix(rows=torch.tensor(shared.rows), pages=pages))
            for row in shared.rows:
                skipped[row] = num_pages
        return self._plan(rows, skipped, prefixes)

    def plan_prefill(self, rows: Rows) -> Attend:
        """See `Attention`."""
        return self._plan(rows, [0] * len(rows.slots), [])

    def _plan(self, rows: Rows, skipped: Sequence[int], prefixes: Sequence[_Prefix]) -> Attend:
        """`skipped`: pages at each row's beginning that `prefixes` take care of."""
        assert not rows.captured, "there are no graphs on a CPU"
        lens, query_lens, window = rows.lens.tolist(), rows.query_lens, self._shape.window
        page_size = self._shape.page_size
        firsts = list(skipped)  # page that each row's own keys begin with
        if window is not None:
            seen = (max(0, n - m - window + 1) for n, m in zip(lens, query_lens, strict=True))
            firsts = [first // page_size for first in seen]
        similar: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (length, num_queries, first) in enumerate(zip(lens, query_lens, firsts, strict=True)):
            sizes = num_queries.bit_length(), (-(-length // page_size) - first).bit_length()
            similar[sizes if num_queries <= _MOST_PADDED else (-1, row)].append(row)
        batches = [self._batch(rows, members, lens, firsts) for members in similar.values()]
        order = _order(similar.values(), query_lens) if len(batches) > 1 else None
        return _CpuAttend(self._shape, batches, order, prefixes)

    def _batch(self, rows: Rows, members: list[int], lens: list[int], firsts: list[int]) -> _Batch:
        page_size = self._shape.page_size
        query_lens = [rows.query_lens[row] for row in members]
        counts = [-(-lens[row] // page_size) - firsts[row] for row in members]
        num_queries, num_pages = max(query_lens), max(counts)
        # Padding repeats a row's last page: it holds numbers, which the mask then takes out.
        own = torch.arange(num_pages).minimum(torch.tensor(counts)[:, None] - 1)
        entries = own + torch.tensor([firsts[row] for row in members])[:, None]
        pages = rows.page_tables[rows.slots[members, None], entries].long().flatten()
        length = lens[members[0]]
        causal = len(members) == 1 and num_queries == length > 1 and firsts[members[0]] == 0
        causal = causal and (self._shape.window is None or length <= self._shape.window)
        ends = list(accumulate(rows.query_lens))
        begins = [ends[row] - rows.query_lens[row] for row in members]
        tokens: Tensor | slice = slice(begins[0], begins[0] + sum(query_lens))
        padded = min(query_lens) < num_queries
        if padded or begins != list(range(begins[0], begins[0] + sum(query_lens), num_queries)):
            queries = torch.arange(num_queries).minimum(torch.tensor(query_lens)[:, None] - 1)
            tokens = (queries + torch.tensor(begins)[:, None]).flatten()
        valid = torch.arange(num_queries) < torch.tensor(query_lens)[:, None]
        return _Batch(
            tokens=tokens,
            num_queries=num_queries,
            pages=pages,
            num_pages=num_pages,
            mask=None if causal else self._mask(members, lens, firsts, query_lens, num_pages),
            causal=causal,
            valid=valid.flatten().nonzero().squeeze(1) if padded else None,
        )

    def _mask(
        self, members: list[int], lens: list[int], firsts: list[int], query_lens: list[int], num_pages: int
    ) -> Tensor | None:
        """[C, 1, Q, W * S] float32; None if every query sees every key."""
        page_size, num_queries = self._shape.page_size, max(query_lens)
        numbers = torch.tensor([(lens[row], firsts[row] * page_size) for row in members])
        row_lens, starts = numbers[:, :1, None], numbers[:, 1:, None]
        keys = starts + torch.arange(num_pages * page_size)
        last_seen = (row_lens - torch.tensor(query_lens)[:, None, None]) + torch.arange(num_queries)[:, None]
        hidden = keys > last_seen.minimum(row_lens - 1)
        if self._shape.window is not None:
            hidden |= keys <= last_seen - self._shape.window
        if not hidden.any():
            return None
        return torch.zeros(hidden.shape, dtype=self._shape.dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)


class _CpuAttend:
    """See `Attend`."""

    def __init__(
        self, shape: AttentionShape, batches: Sequence[_Batch], order: Tensor | None, prefixes: Sequence[_Prefix]
    ) -> None:
        self._shape = shape
        self._batches = batches
        self._order = order  # where each query's result stands among the batches'; None: as they come
        self._prefixes = prefixes

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
        parts = [self._run(batch, q, k_pages, v_pages) for batch in self._batches]
        outs, sums = [out for out, _ in parts], [sums for _, sums in parts]
        result, lse = (x[0] if self._order is None else torch.cat(x)[self._order] for x in (outs, sums))
        for prefix in self._prefixes:
            part, part_lse = self._run_prefix(prefix, q, k_pages, v_pages)
            own, own_lse = result[prefix.rows], lse[prefix.rows]
            result[prefix.rows] = torch.lerp(own, part, torch.sigmoid(part_lse - own_lse).unsqueeze(-1))
            lse[prefix.rows] = torch.logaddexp(own_lse, part_lse)
        if sinks is not None:
            result = result * torch.sigmoid(lse - sinks).unsqueeze(-1)
        return result if out is None else out.copy_(result)

    def _run(self, batch: _Batch, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
        """Results [T', Hq, D] and log-sum-exps [T', Hq] of a batch's queries."""
        num_kv_heads, head_dim = k_pages.shape[2:]
        # With one query each, the heads of a group become queries of one head, which then reads its keys once.
        folded = batch.num_queries == 1
        heads = (num_kv_heads, q.shape[1] // num_kv_heads) if folded else (batch.num_queries, q.shape[1])
        queries = q[batch.tokens].reshape(-1, *heads, head_dim)
        keys = (-1, batch.num_pages * k_pages.shape[1], num_kv_heads, head_dim)
        k, v = (x.index_select(0, batch.pages).view(keys).transpose(1, 2) for x in (k_pages, v_pages))
        out, lse = self._fused(queries if folded else queries.transpose(1, 2), k, v, batch.mask, batch.causal)
        out, lse = (x.flatten(0, 1) if folded else x.transpose(1, 2).flatten(0, 1) for x in (out, lse))
        out, lse = out.reshape(-1, q.shape[1], head_dim), lse.reshape(-1, q.shape[1])
        return (out, lse) if batch.valid is None else (out[batch.valid], lse[batch.valid])

    def _run_prefix(self, prefix: _Prefix, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
        """Results [C, Hq, D] and log-sum-exps [C, Hq]: the rows and heads of a group are queries of one head."""
        queries = q[prefix.rows].unflatten(1, (k_pages.shape[2], -1)).transpose(0, 1).flatten(1, 2)[None]
        k, v = (x.index_select(0, prefix.pages).flatten(0, 1).transpose(0, 1)[None] for x in (k_pages, v_pages))
        out, lse = self._fused(queries, k, v, None, False)
        back = (len(prefix.rows), -1)
        out, lse = (x[0].unflatten(1, back).transpose(0, 1).flatten(1, 2) for x in (out, lse))
        return out, lse

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        """q [C, Hq, Q, D] over k and v [C, Hk, K, D] -> [C, Hq, Q, D] and log-sum-exps [C, Hq, Q]."""
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, 0.0, causal, attn_mask=mask, scale=self._shape.scale)
        return out, lse


def _order(batches: Iterable[list[int]], query_lens: Sequence[int]) -> Tensor:
    """[T] int64: where the queries of all rows, in the rows' order, stand in the batches' results."""
    rows = torch.tensor([row for batch in batches for row in batch for _ in range(query_lens[row])])
    return rows.argsort(stable=True)


class CpuBackend:
    """See `AttentionBackend`."""

    captures = False
    captures_prefill = False
    least_shared = 512  # not measured: merging is cheap beside reading that many tokens

    def supports(self, query: OpQuery) -> str | None:
        """CPUs, without soft caps."""
        return "soft caps are not implemented" if query.soft_cap else needs_cpu(query)

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return CpuAttention(shape)


BACKEND = CpuBackend()
