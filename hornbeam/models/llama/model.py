"""The Llama-like decoder: pre-norm blocks of grouped-query attention with rotary positions and a gated SiLU layer."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hornbeam.layers.attention import Attention, Rotary
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Embedding, Head, Linear
from hornbeam.layers.norm import RMSNorm
from hornbeam.ops.rope.frequencies import rope_table

if TYPE_CHECKING:
    from hornbeam.models.llama.spec import LlamaConfig


class LlamaAttention(nn.Module):
    """Projections around the attention of one layer."""

    def __init__(self, config: "LlamaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        bias = config.attention_bias
        self.qkv = Linear(config.hidden_size, parts, context, bias=bias, split="out")
        self.attend = Attention(layer, heads, kv_heads, head_dim, context)
        self.output = Linear(heads * head_dim, (config.hidden_size,), context, bias=bias, split="in")

    def forward(self, x: Tensor, rotary: Rotary, positions: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.output(self.attend(self.qkv(x, fwd), rotary, positions, fwd), fwd)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: "LlamaConfig", context: BuildContext) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(config.hidden_size, (size, size), context, bias=bias, split="out")
        self.down = Linear(size, (config.hidden_size,), context, bias=bias, split="in")
        self._activation = context.kernels.activation

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self._activation.silu_mul(self.gate_up(x, fwd)), fwd)


class LlamaBlock(nn.Module):
    """One layer. `residual` is the running sum; each half adds its input to it and returns its own output."""

    def __init__(self, config: "LlamaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.attention = LlamaAttention(config, layer, context)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.mlp = LlamaMLP(config, context)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor]:
        """x [T, H], residual [T, H] or None in the first layer -> the block's output and the sum up to it."""
        normed = self.attention_norm(x, residual)
        residual = x if residual is None else residual
        x = self.attention(normed, rotary, positions, fwd)
        return self.mlp(self.mlp_norm(x, residual), fwd), residual


class LlamaModel(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: "LlamaConfig", context: BuildContext) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(LlamaBlock(config, layer, context) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        tied = self.embed if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, context, tied)
        table = rope_table(config.head_dim, config.rope_theta, config.rope_scaling, context.context_len)
        self.rotary = Rotary(table, context)

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm."""
        x, residual = self.embed(ids, fwd), None
        for layer in self.layers:
            x, residual = layer(x, residual, self.rotary, positions, fwd)
        return self.norm(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return self.head(hidden)
