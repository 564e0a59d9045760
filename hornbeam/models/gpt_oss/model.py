"""Blocks of attention with sinks and of experts with biases and a clamped unit."""

from typing import TYPE_CHECKING

from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import Decoder, DecoderBlock
from hornbeam.layers.moe import MoE
from hornbeam.ops.moe.contract import GatedUnit, RoutingRule

if TYPE_CHECKING:
    from hornbeam.models.gpt_oss.spec import GptOssConfig


class GptOssModel(Decoder):
    """The decoder with experts in every layer."""

    def __init__(self, config: "GptOssConfig", context: BuildContext) -> None:
        super().__init__(config, (_block(config, layer, context) for layer in range(config.num_layers)), context)


def _block(config: "GptOssConfig", layer: int, context: BuildContext) -> DecoderBlock:
    assert config.mixture is not None
    rule = RoutingRule(top_k=config.mixture.top_k, renormalize=True)  # that is the softmax of the chosen logits
    unit = GatedUnit(alpha=config.swiglu_alpha, limit=config.swiglu_limit, offset=1.0)
    return DecoderBlock(
        config, layer, MoE(config.hidden_size, config.mixture, rule, context, unit=unit, bias=True), context
    )
