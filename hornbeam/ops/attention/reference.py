"""Paged attention in plain torch: each row's pages are gathered, then torch's fused attention runs on them.

Soft caps and sinks, which that does not know, are written out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows
from hornbeam.ops.query import OpQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    """What the queries of a row may see."""

    pages: Tensor  # int64 numbers
    stretch: slice  # of the tokens of these pages, one after the other
    mask: Tensor | None  # [queries, keys] bool, True where a query may look; None: everywhere


class ReferenceAttention:
    """Row by row; lengths are read back to the host, so it cannot run inside a graph."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def plan_decode(self, rows: Rows) -> Attend:
        """See `Attention`."""
        return self.plan_prefill(rows)

    def plan_prefill(self, rows: Rows) -> Attend:
        """See `Attention`."""
        assert not rows.captured, "the reference cannot be captured in a graph"
        query_lens = list(rows.query_lens)
        numbers = zip(rows.slots.tolist(), query_lens, rows.lens.tolist(), strict=True)
        keys = [self._keys(rows.page_tables[slot], num_queries, length) for slot, num_queries, length in numbers]

        def attend(
            q: Tensor,
            k_pages: Tensor,
            v_pages: Tensor,
            sinks: Tensor | None = None,
            fresh: Fresh | None = None,
            out: Tensor | None = None,
        ) -> Tensor:
            parts = zip(q.split(query_lens), keys, strict=True)
            return torch.cat([self._attend(*part, k_pages, v_pages, sinks) for part in parts], out=out)

        return attend

    def _keys(self, page_table: Tensor, num_queries: int, length: int) -> _Keys:
        page_size, window = self._shape.page_size, self._shape.window
        first = 0 if window is None else max(0, length - num_queries - window + 1)
        first_page = first // page_size
        pages = page_table[first_page : -(-length // page_size)].long()
        stretch = slice(first - first_page * page_size, length - first_page * page_size)
        mask = None
        if num_queries > 1:
            mask = torch.ones(num_queries, length - first, dtype=torch.bool, device=self._shape.device)
            last_seen = length - num_queries - first  # of the first query
            mask = mask.tril(last_seen)
            if window is not None:
                mask = mask.triu(last_seen - window + 1)
        return _Keys(pages=pages, stretch=stretch, mask=mask)

    def _attend(self, q: Tensor, keys: _Keys, k_pages: Tensor, v_pages: Tensor, sinks: Tensor | None) -> Tensor:
        q, (k, v) = (
            q.transpose(0, 1),
            (x[keys.pages].flatten(0, 1)[keys.stretch].transpose(0, 1) for x in (k_pages, v_pages)),
        )
        if self._shape.soft_cap is not None or sinks is not None:
            return self._written_out(q, k, v, keys.mask, sinks).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=keys.mask, scale=self._shape.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """q [Hq, queries, D], k and v [Hk, keys, D] -> [Hq, queries, D]."""
        num_kv_heads, num_keys = k.shape[:2]
        groups = q.unflatten(0, (num_kv_heads, -1))
        scores = (groups @ k[:, None].transpose(-1, -2)) * self._shape.scale
        if (cap := self._shape.soft_cap) is not None:
            scores = cap * torch.tanh(scores / cap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            own = sinks.to(scores.dtype).view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, own), -1)
        out: Tensor = scores.softmax(-1)[..., :num_keys] @ v[:, None]
        return out.flatten(0, 1)


class ReferenceBackend:
    """Serves every device and shape."""

    captures = False
    captures_prefill = False
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return ReferenceAttention(shape)


BACKEND = ReferenceBackend()
