"""The Llama-like decoder: what its models do otherwise than `layers.decoder`."""

from typing import TYPE_CHECKING

from torch import Tensor

from hornbeam.layers.attention import Rotary, wanted_rows
from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import Decoder, DecoderBlock, make_rotaries
from hornbeam.layers.forward import Forward
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.norm import normed_gated, normed_linear

if TYPE_CHECKING:
    from hornbeam.models.llama.spec import LlamaConfig


class LlamaBlock(DecoderBlock):
    """One layer, pre-norm; what its halves return is scaled."""

    def __init__(self, config: "LlamaConfig", layer: int, context: BuildContext) -> None:
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, context, bias=config.mlp_bias)
        super().__init__(config, layer, mlp, context)
        self.mlp: GatedMLP
        self._multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary | None, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """See `DecoderBlock`."""
        qkv, residual = normed_linear(self.attention_norm, self.attention.qkv, x, residual, fwd)
        heads = self.attention(qkv, rotary, positions, fwd)
        residual = wanted_rows(residual, self.attention.layer, fwd)
        x, residual = self.attention.output.added(heads, residual, fwd, factor=self._multiplier)
        mlp = self.mlp
        return normed_gated(self.mlp_norm, mlp.gate_up, mlp.down, x, residual, fwd, factor=self._multiplier)


class PostNormBlock(LlamaBlock):
    """One layer that norms what its halves return, not what they take; its output is the sum itself."""

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: Rotary | None, positions: Tensor, fwd: Forward
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, H], residual None -> the sum [T, H], None."""
        heads = self.attention(self.attention.qkv(x, fwd), rotary, positions, fwd)
        x = wanted_rows(x, self.attention.layer, fwd) + self.attention_norm(self.attention.output(heads, fwd))
        return x + self.mlp_norm(self.mlp(x, fwd)), None


class LlamaModel(Decoder):
    """The decoder with scaled embeddings and logits, and with layers that rotate nothing."""

    def __init__(self, config: "LlamaConfig", context: BuildContext) -> None:
        block = PostNormBlock if config.post_norm else LlamaBlock
        super().__init__(config, (block(config, layer, context) for layer in range(config.num_layers)), context)
        self._config = config
        self._rotaries = make_rotaries(config.ropes, context, {config.rope: self.rotary})

    def forward(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H] after the final norm, of the tokens that are wanted."""
        x, residual = scaled(self.embed(ids, fwd), self._config.embedding_multiplier), None
        for layer, rotary in zip(self.layers, self._rotaries, strict=True):
            x, residual = layer(x, residual, rotary, positions, fwd)
        return self.norm(x, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return scaled(self.head(hidden), 1 / self._config.logits_divisor)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor; most models scale nothing."""
    return x if factor == 1 else x * factor
