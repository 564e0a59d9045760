"""Multi-head latent attention of one layer: the cache holds one row per token, which all heads share.

Decode is absorbed, prefill is what was planned for the step: `ops.mla.contract` says what that means. Knows nothing of
families.
"""

import torch
from torch import Tensor, nn

from hornbeam.layers.attention import Rotary, wanted_rows
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder_config import LatentShape
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear
from hornbeam.layers.norm import RMSNorm, normed_linear
from hornbeam.layers.parameters import empty_parameter
from hornbeam.ops.attention.contract import LatentAttend
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.qkv.contract import Rotation


class UpProjection(nn.Module):
    """From the latent to each head's key and value: the weight [Hq (nope + value), C] alone, kept as it is loaded.

    Nothing is derived of it: on an H200 products with views of its heads take as long as those with copies.
    """

    def __init__(self, shape: LatentShape, num_heads: int, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter((num_heads * (shape.nope_dim + shape.value_dim), shape.rank), context)
        self._num_heads = num_heads

    def by_head(self) -> Tensor:
        """A view [Hq, nope + value, C]."""
        return self.weight.unflatten(0, (self._num_heads, -1))


class LatentAttention(nn.Module):
    """The attention of one layer and the projections around it, which the block calls: `qkv` ahead, `output` behind."""

    def __init__(self, shape: LatentShape, layer: int, context: BuildContext) -> None:
        super().__init__()
        assert context.kernels.latent_rows is not None, "the config of such a model must have its latent sizes"
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
        self._num_heads = num_heads
        self.layer = layer
        self._rows = context.kernels.latent_rows

    def forward(self, qkv: Tensor, rotary: Rotary, positions: Tensor, fwd: Forward) -> Tensor:
        """What `qkv` projected: [T, queries' latent (or queries) + C + R] -> `wanted_rows` of [T, Hq V]."""
        q, row = qkv.split_with_sizes(self.qkv.parts, -1)
        if self.query is not None and self.query_norm is not None:
            q, _ = normed_linear(self.query_norm, self.query, q.contiguous(), None, fwd)
        out = self._attend(q.unflatten(-1, (self._num_heads, -1)), row, rotary(positions), fwd)
        return wanted_rows(out.flatten(1), self.layer, fwd)

    def _attend(self, q: Tensor, row: Tensor, rotation: Rotation, fwd: Forward) -> Tensor:
        """q [T, Hq, N + R], row [T, C + R] -> [T, Hq, V]."""
        assert not fwd.prefills_all, "no backend of latent attention captures prefill"
        cache = fwd.caches[self.layer]
        (pages,) = cache.tensors
        step, up = fwd.groups[cache.group], self.up.by_head()
        norm = InputNorm(weight=self.latent_norm.weight, eps=self.latent_norm.eps)
        prepared: list[tuple[LatentAttend, Tensor, Tensor]] = []
        for attend, part in ((step.decode, slice(fwd.num_decode)), (step.prefill, slice(fwd.num_decode, None))):
            if attend is None:
                continue
            assert isinstance(attend, LatentAttend)
            queries, fresh = q[part], row[part]
            turn = Rotation(table=rotation.table, positions=rotation.positions[part])
            if attend.absorbed:
                queries = self._rows.absorb(queries, fresh, norm, turn, pages, step.rows[part], up)
            else:
                self._rows.store(queries, fresh, norm, turn, pages, step.rows[part])
            prepared.append((attend, queries, fresh))
        # Only now, since rows of the step may lie in the prefixes of others.
        outputs = [attend.run(queries, fresh, pages, up) for attend, queries, fresh in prepared]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
