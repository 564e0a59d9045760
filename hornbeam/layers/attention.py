"""Attention of one layer: normalise and rotate, write keys and values to the cache, attend."""

from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder_config import DecoderConfig
from hornbeam.layers.forward import Forward
from hornbeam.layers.head_norm import QueryKeyNorm
from hornbeam.layers.linear import Linear
from hornbeam.layers.parameters import empty_parameter
from hornbeam.ops.attention.contract import LatentAttend, StoringAttend
from hornbeam.ops.qkv.contract import HeadNorms, Rotation


class Rotary(nn.Module):
    """The rotation table that all layers of a model share."""

    def __init__(self, table: Tensor, context: BuildContext) -> None:
        """Take a table [P, R] float32 as `ops.rope.frequencies.rope_table` makes it, for R rotated features."""
        super().__init__()
        self.register_buffer("table", table.to(context.device), persistent=False)
        self.table: Tensor

    def forward(self, positions: Tensor) -> Rotation:
        """How heads turn at positions [T]."""
        return Rotation(table=self.table, positions=positions)


class Attention(nn.Module):
    """Causal attention with grouped heads; no weights of its own."""

    def __init__(self, layer: int, num_heads: int, num_kv_heads: int, head_dim: int, context: BuildContext) -> None:
        super().__init__()
        axis = context.grid.attn_tp
        self._layer = layer
        self._shape = (axis.share(num_heads, "heads"), axis.share(num_kv_heads, "key-value heads"), head_dim)
        self._qkv = context.kernels.qkv

    def forward(
        self,
        qkv: Tensor,
        norm: QueryKeyNorm | None,
        rotary: Rotary | None,
        positions: Tensor,
        fwd: Forward,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[T, (Hq + 2 Hk) D], of which queries and keys are normalised and rotated in place -> [T, Hq D].

        norm: of each head, or None; rotary: None where this layer has no positions; sinks: [Hq], see `Attend`.
        """
        num_heads, num_kv_heads, head_dim = self._shape
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
        norms = None if norm is None else norm.of_heads()
        rotation = None if rotary is None else rotary(positions)
        return self.attend(q, k, v, norms, rotation, fwd, sinks).flatten(1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        fwd: Forward,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The same with the heads apart: q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        cache = fwd.caches[self._layer]
        k_pages, v_pages = cache.tensors
        step = fwd.groups[cache.group]
        whole = rotation is None or rotation.table.shape[1] == q.shape[2]
        if whole and isinstance(step.decode, StoringAttend) and step.prefill is None:
            return step.decode.run(q, k, v, norms, rotation, step.rows, k_pages, v_pages, sinks)
        self._qkv.store(q, k, v, norms, rotation, k_pages, v_pages, step.rows)
        assert not isinstance(step.decode, LatentAttend)
        assert not isinstance(step.prefill, LatentAttend)
        n, out = fwd.num_decode, q.new_empty(q.shape)
        if step.prefill is not None:
            first = 0 if fwd.prefills_all else n
            step.prefill(q[first:], k_pages, v_pages, sinks, (k[n:], v[n:]), out[first:])
        if step.decode is not None:  # behind prefill: in a graph empty rows keep what that has written
            step.decode(q[:n], k_pages, v_pages, sinks, None, out[:n])
        return out


def wanted_rows(x: Tensor, layer: int, fwd: Forward) -> Tensor:
    """x [T, ...], of which what is wanted of the step: behind the last layer's attention nobody reads other tokens."""
    return x if fwd.wanted is None or layer + 1 < len(fwd.caches) else x[fwd.wanted]


class DecoderAttention(nn.Module):
    """The attention of one layer and the projections around it, which the block calls: `qkv` ahead, `output` behind."""

    def __init__(self, config: DecoderConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv = Linear(config.hidden_size, parts, context, bias=config.qkv_bias, split="out")
        self.norm: QueryKeyNorm | None = None
        if config.qk_norm != "none":
            per_head, eps = config.qk_norm == "head", config.rms_norm_eps
            self.norm = QueryKeyNorm(heads, kv_heads, head_dim, eps, context, per_head=per_head)
        self.layer = layer
        self.attend = Attention(layer, heads, kv_heads, head_dim, context)
        self.sinks = empty_parameter((heads,), context) if config.attention_sinks else None
        self.output = Linear(heads * head_dim, (config.hidden_size,), context, bias=config.output_bias, split="in")

    def forward(self, qkv: Tensor, rotary: Rotary | None, positions: Tensor, fwd: Forward) -> Tensor:
        """What `qkv` projected [T, (Hq + 2 Hk) D] -> `wanted_rows` of [T, Hq D]; rotary: None for no positions."""
        norm = self.norm
        if norm is not None and not norm.per_head:
            qkv, norm = norm(qkv), None
        out = self.attend(qkv, norm, rotary, positions, fwd, self.sinks)
        return wanted_rows(out, self.layer, fwd)
