"""Blocks of attention and experts, whose weights sum to 1 for each token."""

from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import Decoder, DecoderBlock
from hornbeam.layers.decoder_config import DecoderConfig
from hornbeam.layers.moe import MoE
from hornbeam.ops.moe.contract import RoutingRule


class MixtralModel(Decoder):
    """The decoder with experts in every layer."""

    def __init__(self, config: DecoderConfig, context: BuildContext) -> None:
        mixture = config.mixture
        assert mixture is not None
        rule = RoutingRule(top_k=mixture.top_k, renormalize=True)
        blocks = (
            DecoderBlock(config, layer, MoE(config.hidden_size, mixture, rule, context), context)
            for layer in range(config.num_layers)
        )
        super().__init__(config, blocks, context)
