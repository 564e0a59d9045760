"""Multi-head latent attention of one layer, absorbed: the cache holds one row per token, which all heads share.

Keys and values of a head would be products of the cached latent with that head's rows of `up`. Instead queries are
multiplied by the rows for keys, and what attention gathers of latents by those for values. Knows nothing of families.
"""

import torch
from torch import Tensor, nn

from hornbeam.layers.attention import Rotary, attend_step
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder_config import LatentShape
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear
from hornbeam.layers.norm import RMSNorm
from hornbeam.layers.parameters import empty_parameter
from hornbeam.ops.linear.contract import InputNorm


class UpProjection(nn.Module):
    """From the latent to each head's key and value: the weight [Hq (nope + value), C] alone, kept as it is loaded."""

    def __init__(self, shape: LatentShape, num_heads: int, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter((num_heads * (shape.nope_dim + shape.value_dim), shape.rank), context)
        self._sizes = shape.nope_dim, shape.value_dim

    def by_head(self) -> tuple[Tensor, Tensor]:
        """Views for keys [Hq, nope, C] and for values [Hq, value, C]."""
        keys, values = self.weight.unflatten(0, (-1, sum(self._sizes))).split(self._sizes, 1)
        return keys, values


class LatentAttention(nn.Module):
    """Projections, absorption, and the attention between them."""

    def __init__(self, shape: LatentShape, layer: int, context: BuildContext) -> None:
        super().__init__()
        assert context.kernels.latent_rows is not None, "the config of such a model must have its latent_dim"
        num_heads = context.grid.attn_tp.share(shape.num_heads, "heads")
        query_size, row_size = num_heads * (shape.nope_dim + shape.rope_dim), shape.rank + shape.rope_dim
        # The row is needed whole on every rank, and so is the queries' latent: rows of heads alone are shared out.
        parts = (shape.query_rank or query_size, row_size)
        self.qkv = Linear(shape.hidden_size, parts, context, bias=shape.bias, split="none")
        self.query_norm: RMSNorm | None = None
        self.query: Linear | None = None
        if shape.query_rank is not None:
            self.query_norm = RMSNorm(shape.query_rank, shape.eps, context)
            size = shape.num_heads * (shape.nope_dim + shape.rope_dim)
            self.query = Linear(shape.query_rank, (size,), context, split="out")
        self.latent_norm = RMSNorm(shape.rank, shape.eps, context)
        self.up = UpProjection(shape, num_heads, context)
        values = shape.num_heads * shape.value_dim
        self.output = Linear(values, (shape.hidden_size,), context, bias=shape.bias, split="in")
        self._shape = shape
        self._num_heads = num_heads
        self._layer = layer
        self._rows = context.kernels.latent_rows

    def forward(self, qkv: Tensor, rotary: Rotary, positions: Tensor, fwd: Forward) -> Tensor:
        """What `qkv` projected: [T, queries' latent (or queries) + C + R] -> [T, H]."""
        shape, cache = self._shape, fwd.caches[self._layer]
        q, row = qkv.split_with_sizes(self.qkv.parts, -1)
        if self.query is not None and self.query_norm is not None:
            q = self.query(self.query_norm(q.contiguous()), fwd)
        plain, turned = q.unflatten(-1, (self._num_heads, -1)).split((shape.nope_dim, shape.rope_dim), -1)
        for_keys, for_values = self.up.by_head()
        query = torch.cat((torch.bmm(plain.transpose(0, 1), for_keys).transpose(0, 1), turned), -1)
        norm = InputNorm(weight=self.latent_norm.weight, eps=self.latent_norm.eps)
        (pages,) = cache.tensors
        self._rows.store(query, row, norm, rotary(positions), pages, fwd.groups[cache.group].rows)
        keys = row.unsqueeze(1)
        values, value_pages = (x[..., : shape.rank] for x in (keys, pages))
        latents = attend_step(fwd, cache.group, query, (keys, values), (pages, value_pages))
        out = torch.bmm(latents.transpose(0, 1), for_values.transpose(1, 2))
        return self.output(out.transpose(0, 1).flatten(1), fwd)
