"""Paged attention in plain torch: each row's pages are gathered, then torch's fused attention runs on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Rows
from hornbeam.ops.query import OpQuery


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
        query_lens, lens = list(rows.query_lens), rows.lens.tolist()
        tables = [
            rows.page_tables[slot, : -(-length // self._shape.page_size)].long()
            for slot, length in zip(rows.slots.tolist(), lens, strict=True)
        ]
        masks = [self._causal_mask(num, length) for num, length in zip(query_lens, lens, strict=True)]

        def attend(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
            parts = zip(q.split(query_lens), tables, lens, masks, strict=True)
            return torch.cat([self._attend(*part, k_pages, v_pages) for part in parts])

        return attend

    def _causal_mask(self, num_queries: int, length: int) -> Tensor | None:
        """[num_queries, length] bool, True where a query may look; None where one query sees everything."""
        if num_queries == 1:
            return None
        every = torch.ones(num_queries, length, dtype=torch.bool, device=self._shape.device)
        return every.tril(length - num_queries)

    def _attend(
        self, q: Tensor, table: Tensor, length: int, mask: Tensor | None, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        k, v = (pages[table].flatten(0, 1)[:length].transpose(0, 1) for pages in (k_pages, v_pages))
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=self._shape.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


class ReferenceBackend:
    """Serves every device and shape without window and soft cap."""

    captures = False
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """Full attention only, until a family needs more."""
        return "windows and soft caps are not implemented" if query.window or query.soft_cap else None

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return ReferenceAttention(shape)


BACKEND = ReferenceBackend()
