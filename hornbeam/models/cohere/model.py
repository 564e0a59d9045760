"""The decoder: in each layer one norm, then attention and a gated MLP side by side, whose outputs are added."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from hornbeam.layers.attention import DecoderAttention, Rotary, wanted_rows
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import make_rotaries
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Embedding, Head
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.parameters import empty_parameter

if TYPE_CHECKING:
    from hornbeam.models.cohere.spec import CohereConfig


class CenteredNorm(nn.Module):
    """Layer normalisation (Ba et al., 2016) over the last dimension, without a bias."""

    def __init__(self, shape: tuple[int, ...], eps: float, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter(shape, context)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[T, *shape] -> [T, *shape]."""
        return F.layer_norm(x.float(), x.shape[-1:], eps=self._eps).mul_(self.weight).to(x.dtype)


class CohereBlock(nn.Module):
    """One layer."""

    def __init__(self, config: "CohereConfig", layer: int, context: BuildContext) -> None:
        super().__init__()
        heads, kv_heads, head_dim, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps
        self.attention_norm = CenteredNorm((config.hidden_size,), eps, context)
        self.attention = DecoderAttention(config, layer, context)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, context)
        self._heads = (heads, kv_heads, kv_heads)
        if config.head_norms:
            self.query_norm = CenteredNorm((heads, head_dim), eps, context)
            self.key_norm = CenteredNorm((kv_heads, head_dim), eps, context)
        self._normed_heads = config.head_norms

    def forward(self, x: Tensor, rotary: Rotary | None, positions: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]; the last layer returns only rows that are wanted."""
        normed = self.attention_norm(x)
        qkv = self.attention.qkv(normed, fwd)
        if self._normed_heads:
            q, k, _ = qkv.view(len(qkv), sum(self._heads), -1).split(self._heads, 1)
            q.copy_(self.query_norm(q))
            k.copy_(self.key_norm(k))
        x, normed = (wanted_rows(rows, self.attention.layer, fwd) for rows in (x, normed))
        heads = self.attention(qkv, rotary, positions, fwd)
        return x + self.attention.output(heads, fwd) + self.mlp(normed, fwd)


class CohereModel(nn.Module):
    """Embedding, blocks, final norm, scaled head."""

    def __init__(self, config: "CohereConfig", context: BuildContext) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(CohereBlock(config, layer, context) for layer in range(config.num_layers))
        self.norm = CenteredNorm((config.hidden_size,), config.rms_norm_eps, context)
        tied = self.embed if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, context, tied)
        self._rotaries = make_rotaries(config.ropes, context)
        self._logit_scale = config.logit_scale

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm, of the tokens that are wanted."""
        x = self.embed(ids, fwd)
        for layer, rotary in zip(self.layers, self._rotaries, strict=True):
            x = layer(x, rotary, positions, fwd)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return self.head(hidden) * self._logit_scale
