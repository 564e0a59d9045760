"""The decoder that most families share: pre-norm blocks of grouped-query attention and what stands behind it."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from hornbeam.layers.attention import DecoderAttention, Rotary, wanted_rows
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder_config import DecoderConfig
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Embedding, Head
from hornbeam.layers.mla import LatentAttention
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.norm import RMSNorm, normed_gated, normed_linear
from hornbeam.ops.rope.frequencies import rope_table
from hornbeam.ops.rope.scaling import RopeSettings


class DecoderBlock(nn.Module):
    """One layer, pre-norm: attention, and what stands behind it. Each half's input and its output add up."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        mlp: nn.Module,
        context: BuildContext,
        attention: DecoderAttention | LatentAttention | None = None,
    ) -> None:
        """Take as `mlp` what stands behind attention: called with x [T, H] and the step.

        attention: None for what `config` describes.
        """
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.attention = attention or DecoderAttention(config, layer, context)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.mlp = mlp

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary | None, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """x and residual [T, H], whose sum is the input -> the same of the output; residual None: x is the sum."""
        qkv, residual = normed_linear(self.attention_norm, self.attention.qkv, x, residual, fwd)
        heads = self.attention(qkv, rotary, positions, fwd)
        x, residual = self.attention.output.added(heads, wanted_rows(residual, self.attention.layer, fwd), fwd)
        if isinstance(self.mlp, GatedMLP):
            return normed_gated(self.mlp_norm, self.mlp.gate_up, self.mlp.down, x, residual, fwd)
        return self.mlp(self.mlp_norm(x, residual), fwd), x if residual is None else residual


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: DecoderConfig, blocks: Iterable[DecoderBlock], context: BuildContext) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        tied = self.embed if config.tie_word_embeddings else None
        self.head = Head(config.vocab_size, config.hidden_size, context, tied)
        self.rotary = _make_rotary(config.rope, context)

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm, of the tokens that are wanted."""
        x, residual = self.embed(ids, fwd), None
        for layer in self.layers:
            x, residual = layer(x, residual, self.rotary, positions, fwd)
        return self.norm(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return self.head(hidden)


def make_rotaries(
    ropes: Sequence[RopeSettings | None],
    context: BuildContext,
    made: Mapping[RopeSettings, Rotary] = MappingProxyType({}),
) -> tuple[Rotary | None, ...]:
    """The rotation of each layer, None for those that rotate nothing; equal ones are shared, with `made` too."""
    rotaries = {rope: made.get(rope) or _make_rotary(rope, context) for rope in set(ropes) if rope is not None}
    return tuple(None if rope is None else rotaries[rope] for rope in ropes)


def _make_rotary(rope: RopeSettings, context: BuildContext) -> Rotary:
    return Rotary(rope_table(rope.dim, rope.theta, rope.scaling, context.context_len), context)
