"""Latent attention in plain torch: each row's pages are gathered once for all heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hornbeam.ops.attention.contract import Attention, AttentionShape, LatentAttend, Rows
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.mla.contract import RaggedAttend, Stretch
from hornbeam.ops.mla.prefill import LatentPrefill, values_of
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery

_LOG2_E = 1.4426950408889634


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
            rotated = x[..., -rotation.table.shape[1] :]
            first, second = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
            rotated.copy_(turned.flatten(-2))
        pages.flatten(0, 2)[rows] = row

    def absorb(
        self, q: Tensor, row: Tensor, norm: InputNorm, rotation: Rotation, pages: Tensor, rows: Tensor, up: Tensor
    ) -> Tensor:
        """See `LatentRows`."""
        self.store(q, row, norm, rotation, pages, rows)
        nope_dim = q.shape[2] - rotation.table.shape[1]
        latent = torch.bmm(q[..., :nope_dim].transpose(0, 1), up[:, :nope_dim]).transpose(0, 1)
        return torch.cat((latent, q[..., nope_dim:]), -1)


class ReferenceRagged:
    """Row by row."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def plan(self, stretches: Sequence[Stretch]) -> Sequence[RaggedAttend]:
        """See `Ragged`."""
        return [self._planned(stretch) for stretch in stretches]

    def merge(self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
        """See `Ragged`."""
        total = torch.logaddexp2(lse, other_lse)
        mine, theirs = ((part - total).exp2().nan_to_num_(0.0).unsqueeze(-1) for part in (lse, other_lse))
        out.copy_(out * mine + other * theirs)
        lse.copy_(total)

    def _planned(self, stretch: Stretch) -> RaggedAttend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            queries = q.split(list(stretch.query_lens))
            keys, values = (x.split(list(stretch.key_lens)) for x in (k, v))
            parts = [self._attend(*part, stretch.causal) for part in zip(queries, keys, values, strict=True)]
            outs, lses = zip(*parts, strict=True)
            return torch.cat(outs), torch.cat(lses)

        return attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        if not len(k):
            return v.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * self._scale
        if causal:
            hidden = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
            scores.masked_fill_(hidden, float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v)
        return out, scores.logsumexp(-1).T.contiguous() * _LOG2_E


class ReferenceLatentAttention:
    """Row by row; lengths are read back to the host, so it cannot run inside a graph."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._prefill = LatentPrefill(shape, ReferenceRagged(shape.scale), self.plan_decode)

    def plan_decode(self, rows: Rows) -> LatentAttend:
        """See `Attention`. Rows may have any numbers of queries."""
        assert not rows.captured, "the reference cannot be captured in a graph"
        query_lens, lens = list(rows.query_lens), rows.lens.tolist()
        page_size = self._shape.page_size
        tables = [
            rows.page_tables[slot, : -(-length // page_size)].long()
            for slot, length in zip(rows.slots.tolist(), lens, strict=True)
        ]

        def run(q: Tensor, row: Tensor, pages: Tensor, up: Tensor) -> Tensor:
            parts = zip(q.split(query_lens), tables, lens, strict=True)
            latents = torch.cat([self._attend(x, pages[mine].flatten(0, 2)[:n], up.shape[2]) for x, mine, n in parts])
            return values_of(latents, up, self._shape)

        return LatentAttend(absorbed=True, run=run)

    def plan_prefill(self, rows: Rows) -> LatentAttend:
        """See `Attention`."""
        return self._prefill.plan(rows)

    def _attend(self, q: Tensor, keys: Tensor, rank: int) -> Tensor:
        """q [queries, Hq, C + R] over keys [n, C + R] -> [queries, Hq, C]: one product for all heads."""
        num_queries, num_heads, _ = q.shape
        scores = (q.flatten(0, 1) @ keys.T).unflatten(0, (num_queries, num_heads)).float() * self._shape.scale
        hidden = torch.ones(num_queries, len(keys), dtype=torch.bool, device=q.device)
        hidden = hidden.triu(len(keys) - num_queries + 1)
        weights = scores.masked_fill_(hidden[:, None], float("-inf")).softmax(-1).to(keys.dtype)
        out: Tensor = weights.flatten(0, 1) @ keys[:, :rank]
        return out.view(num_queries, num_heads, rank)


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
        return ReferenceLatentAttention(shape)


ROWS = ReferenceRows()
ATTENTION = ReferenceBackend()
