"""The decoder: attention and a gated GELU layer, each between two norms; windows and everything in turn."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hornbeam.layers.attention import Attention, Rotary, wanted_rows
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import make_rotaries
from hornbeam.layers.forward import Forward
from hornbeam.layers.head_norm import QueryKeyNorm
from hornbeam.layers.linear import Embedding, Head, Linear
from hornbeam.layers.norm import RMSNorm

if TYPE_CHECKING:
    from hornbeam.models.gemma.spec import GemmaConfig


class GemmaAttention(nn.Module):
    """Projections around the attention of one layer."""

    def __init__(self, config: "GemmaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        bias = config.attention_bias
        self.qkv = Linear(config.hidden_size, parts, context, bias=bias, split="out")
        self.norm: QueryKeyNorm | None = None
        if config.row.qk_norm:
            self.norm = QueryKeyNorm(heads, kv_heads, head_dim, config.rms_norm_eps, context, per_head=True, wide=True)
        self.layer = layer
        self.attend = Attention(layer, heads, kv_heads, head_dim, context)
        self.output = Linear(heads * head_dim, (config.hidden_size,), context, bias=bias, split="in")

    def forward(self, x: Tensor, rotary: Rotary, positions: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        out = self.attend(self.qkv(x, fwd), self.norm, rotary, positions, fwd)
        return self.output(wanted_rows(out, self.layer, fwd), fwd)


class GemmaMLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: "GemmaConfig", context: BuildContext) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up = Linear(config.hidden_size, (size, size), context, split="out")
        self.down = Linear(size, (config.hidden_size,), context, split="in")
        self._activation = context.kernels.activation

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.down(self._activation.gelu_tanh_mul(self.gate_up(x, fwd)), fwd)


class GemmaBlock(nn.Module):
    """One layer. `residual` is the running sum; each half adds its input to it, then returns its output."""

    def __init__(self, config: "GemmaConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        self.attention_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, context, wide=True) for _ in range(4)
        )
        self.attention = GemmaAttention(config, layer, context)
        self.mlp = GemmaMLP(config, context)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor]:
        """x [T, H], residual [T, H] or None in the first layer -> the block's output and the sum up to it."""
        normed = self.attention_norm(x, residual)
        residual = wanted_rows(x if residual is None else residual, self.attention.layer, fwd)
        x = self.post_attention_norm(self.attention(normed, rotary, positions, fwd))
        return self.post_mlp_norm(self.mlp(self.mlp_norm(x, residual), fwd)), residual


class GemmaModel(nn.Module):
    """Scaled embedding, blocks, final norm, head."""

    def __init__(self, config: "GemmaConfig", context: BuildContext) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(GemmaBlock(config, layer, context) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context, wide=True)
        tied = self.embed if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, context, tied)
        ropes = [config.window_rope if slides else config.rope for slides in config.slides]
        self._rotaries = make_rotaries(ropes, context)
        # These models were trained with the factor rounded to the weights' format.
        self._embedding_factor = float(torch.tensor(config.hidden_size**0.5, dtype=context.dtype))
        self._logits_soft_cap = config.logits_soft_cap

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm, of the tokens that are wanted."""
        x, residual = self.embed(ids, fwd) * self._embedding_factor, None
        for layer, rotary in zip(self.layers, self._rotaries, strict=True):
            x, residual = layer(x, residual, rotary, positions, fwd)
        return self.norm(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        logits, cap = self.head(hidden), self._logits_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
