"""Attention of one layer over its cache: rotate, write keys and values, attend."""

import torch
from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward


class Rotary(nn.Module):
    """The rotation table that all layers of a model share."""

    def __init__(self, table: Tensor, context: BuildContext) -> None:
        """Take a table [P, R] float32 as `ops.rope.frequencies.rope_table` makes it, for R rotated features."""
        super().__init__()
        self.register_buffer("table", table.to(context.device), persistent=False)
        self.table: Tensor
        self._rope = context.kernels.rope

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        """Rotate the first R features of q [T, Hq, D] and k [T, Hk, D] in place to positions [T]."""
        rotated = self.table.shape[1]
        self._rope.rotate(q[..., :rotated], k[..., :rotated], positions, self.table)


class Attention(nn.Module):
    """Causal attention with grouped heads; no weights of its own."""

    def __init__(self, layer: int, num_heads: int, num_kv_heads: int, head_dim: int, context: BuildContext) -> None:
        super().__init__()
        axis = context.grid.attn_tp
        self._layer = layer
        self._shape = (axis.share(num_heads, "heads"), axis.share(num_kv_heads, "key-value heads"), head_dim)
        self._write = context.kernels.cache_write

    def forward(self, qkv: Tensor, rotary: Rotary | None, positions: Tensor, fwd: Forward) -> Tensor:
        """[T, (Hq + 2 Hk) D], rotated in place unless `rotary` is None -> [T, Hq D]."""
        num_heads, num_kv_heads, head_dim = self._shape
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
        if rotary is not None:
            rotary(q, k, positions)
        cache = fwd.caches[self._layer]
        group = fwd.groups[cache.group]
        self._write.write(k, v, cache.k, cache.v, group.rows)
        n = fwd.num_decode
        outputs = []
        if group.decode is not None:
            outputs.append(group.decode(q[:n], cache.k, cache.v))
        if group.prefill is not None:
            outputs.append(group.prefill(q[n:], cache.k, cache.v))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)
