"""RMS normalisation with its weight: of hidden rows, alone or on their way into a product, and of queries and keys."""

import torch
from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear, empty_parameter
from hornbeam.ops.activation.contract import Activation
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.qkv.contract import HeadNorms


class RMSNorm(nn.Module):
    """Normalises; with a residual, adds first and keeps the sum.

    wide: the weight is float32, for models that learn how much it differs from 1: near 1 half precision is coarse.
    """

    def __init__(self, size: int, eps: float, context: BuildContext, *, wide: bool = False) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), context, torch.float32 if wide else None)
        self.eps = eps
        self._norm = context.kernels.norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H]. A given residual [T, H] becomes residual + x, in place, and its norm is returned."""
        if residual is None:
            return self._norm.rms_norm(x, self.weight, self.eps)
        return self._norm.add_rms_norm(x, residual, self.weight, self.eps)


class QueryKeyNorm(nn.Module):
    """The norms of queries and keys: of each head by itself, or of all heads of a token together."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        context: BuildContext,
        *,
        per_head: bool,
        wide: bool = False,
    ) -> None:
        super().__init__()
        axis = context.grid.attn_tp
        self._sizes = tuple(axis.share(heads, "heads") * head_dim for heads in (num_heads, num_kv_heads))
        query_size, key_size = (head_dim, head_dim) if per_head else self._sizes
        self.query = RMSNorm(query_size, eps, context, wide=wide)
        self.key = RMSNorm(key_size, eps, context, wide=wide)
        self.per_head = per_head

    def of_heads(self) -> HeadNorms:
        """What norms each head by itself."""
        assert self.per_head
        return HeadNorms(query=self.query.weight, key=self.key.weight, eps=self.query.eps)

    def forward(self, qkv: Tensor) -> Tensor:
        """[T, (Hq + 2 Hk) D], of which all queries and all keys of a token are normalised together; returned."""
        assert not self.per_head
        start = 0
        for norm, size in zip((self.query, self.key), self._sizes, strict=True):
            part = qkv[:, start : start + size]
            part.copy_(norm(part))
            start += size
        return qkv


def normed_linear(
    norm: RMSNorm,
    linear: Linear,
    x: Tensor,
    residual: Tensor | None,
    fwd: Forward,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """linear(norm(x + residual)), gated by silu if there is an `activation`, and x + residual.

    As one kernel where that is faster. x and residual are [T, H]; residual is None ahead of the first block, and may be
    changed in place.
    """
    gated = activation is not None
    if 1 <= x.shape[0] <= linear.product.fused_rows and fwd.adapters is None:
        settings = InputNorm(weight=norm.weight, eps=norm.eps)
        return linear.product.normed(x, residual, settings, linear.weight, linear.bias, gated=gated)
    out = linear(norm(x, residual), fwd)
    return activation.silu_mul(out) if activation is not None else out, x if residual is None else residual
