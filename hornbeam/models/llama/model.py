"""The Llama-like decoder: blocks of grouped-query attention with rotary positions and a gated SiLU layer."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hornbeam.layers.attention import Attention, Rotary
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Embedding, Head, Linear
from hornbeam.layers.norm import QueryKeyNorm, RMSNorm, normed_linear
from hornbeam.ops.rope.frequencies import rope_table

if TYPE_CHECKING:
    from hornbeam.models.llama.spec import LlamaConfig


class LlamaAttention(nn.Module):
    """Projections around the attention of one layer."""

    def __init__(self, config: "LlamaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv = Linear(config.hidden_size, parts, context, bias=config.qkv_bias, split="out")
        self.norm: QueryKeyNorm | None = None
        if config.qk_norm != "none":
            per_head, eps = config.qk_norm == "head", config.rms_norm_eps
            self.norm = QueryKeyNorm(heads, kv_heads, head_dim, eps, context, per_head=per_head)
        self.attend = Attention(layer, heads, kv_heads, head_dim, context)
        self.output = Linear(heads * head_dim, (config.hidden_size,), context, bias=config.output_bias, split="in")

    def forward(self, qkv: Tensor, rotary: Rotary | None, positions: Tensor, fwd: Forward) -> Tensor:
        """What `qkv` projected [T, (Hq + 2 Hk) D] -> [T, H]."""
        norm = self.norm
        if norm is not None and not norm.per_head:
            qkv, norm = norm(qkv), None
        return self.output(self.attend(qkv, norm, rotary, positions, fwd), fwd)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: "LlamaConfig", context: BuildContext) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(config.hidden_size, (size, size), context, bias=bias, split="out")
        self.down = Linear(size, (config.hidden_size,), context, bias=bias, split="in")
        self.activation = context.kernels.activation

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self.activation.silu_mul(self.gate_up(x, fwd)), fwd)


class LlamaBlock(nn.Module):
    """One layer, pre-norm. `residual` is the running sum; each half adds its input to it, then returns its output."""

    def __init__(self, config: "LlamaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.attention = LlamaAttention(config, layer, context)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.mlp = LlamaMLP(config, context)
        self._multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary | None, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H], residual [T, H] or None in the first layer -> the block's output and the sum up to it."""
        qkv, residual = normed_linear(self.attention_norm, self.attention.qkv, x, residual, fwd)
        x = scaled(self.attention(qkv, rotary, positions, fwd), self._multiplier)
        hidden, residual = normed_linear(self.mlp_norm, self.mlp.gate_up, x, residual, fwd, self.mlp.activation)
        return scaled(self.mlp.down(hidden, fwd), self._multiplier), residual


class PostNormBlock(LlamaBlock):
    """One layer that norms what its halves return, not what they take; its output is the sum itself."""

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary | None, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H], residual None -> the sum [T, H], None."""
        x = x + self.attention_norm(self.attention(self.attention.qkv(x, fwd), rotary, positions, fwd))
        return x + self.mlp_norm(self.mlp(x, fwd)), None


class LlamaModel(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: "LlamaConfig", context: BuildContext) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size, context)
        block = PostNormBlock if config.post_norm else LlamaBlock
        self.layers = nn.ModuleList(block(config, layer, context) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        tied = self.embed if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, context, tied)
        rope = config.rope
        self.rotary = Rotary(rope_table(rope.dim, rope.theta, rope.scaling, context.context_len), context)
        self._config = config

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm."""
        x, residual = scaled(self.embed(ids, fwd), self._config.embedding_multiplier), None
        for layer, rotates in zip(self.layers, self._config.rotary_layers, strict=True):
            x, residual = layer(x, residual, self.rotary if rotates else None, positions, fwd)
        return self.norm(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return scaled(self.head(hidden), 1 / self._config.logits_divisor)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor; most models scale nothing."""
    return x if factor == 1 else x * factor
