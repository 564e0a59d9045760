"""The norms of queries and keys in attention."""

from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.norm import RMSNorm
from hornbeam.ops.qkv.contract import HeadNorms


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
