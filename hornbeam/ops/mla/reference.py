"""Latent attention in plain torch: each row's pages are gathered once for all heads."""

import torch
from torch import Tensor

from hornbeam.ops.attention.contract import Attend, Attention, AttentionShape, Fresh, Rows
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery


class ReferenceRows:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def store(self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor) -> None:
        """See `LatentRows`."""
        latent = row[:, : len(norm.weight)]
        latent.copy_(ReferenceNorm().rms_norm(latent, norm.weight, norm.eps))
        cos, sin = rotation.table[rotation.positions].unsqueeze(1).chunk(2, -1)
        for x in (q, row.unsqueeze(1)):
            rotated = x[..., len(norm.weight) :]
            first, second = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
            rotated.copy_(turned.flatten(-2))
        pages.flatten(0, 2)[rows] = row


class ReferenceLatentAttention:
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
        page_size = self._shape.page_size
        pages = [
            rows.page_tables[slot, : -(-length // page_size)].long()
            for slot, length in zip(rows.slots.tolist(), lens, strict=True)
        ]

        def attend(
            q: Tensor, k_pages: Tensor, v_pages: Tensor, sinks: Tensor | None = None, fresh: Fresh | None = None
        ) -> Tensor:
            assert sinks is None, "no latent attention has sinks"
            value_dim = v_pages.shape[-1]
            parts = zip(q.split(query_lens), pages, lens, strict=True)
            return torch.cat([self._attend(x, k_pages[mine].flatten(0, 2)[:n], value_dim) for x, mine, n in parts])

        return attend

    def _attend(self, q: Tensor, keys: Tensor, value_dim: int) -> Tensor:
        """q [queries, Hq, C + R] over keys [n, C + R] -> [queries, Hq, C]: one product for all heads."""
        num_queries, num_heads, _ = q.shape
        scores = (q.flatten(0, 1) @ keys.T).unflatten(0, (num_queries, num_heads)).float() * self._shape.scale
        hidden = torch.ones(num_queries, len(keys), dtype=torch.bool, device=q.device)
        hidden = hidden.triu(len(keys) - num_queries + 1)
        weights = scores.masked_fill_(hidden[:, None], float("-inf")).softmax(-1).to(keys.dtype)
        out: Tensor = weights.flatten(0, 1) @ keys[:, :value_dim]
        return out.view(num_queries, num_heads, value_dim)


class ReferenceBackend:
    """Serves every device and shape."""

    captures = False
    least_shared = None

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def create(self, shape: AttentionShape, max_rows: int) -> Attention:
        """See `AttentionBackend`."""
        return ReferenceLatentAttention(shape)


ROWS = ReferenceRows()
ATTENTION = ReferenceBackend()
