"""Blocks of attention and experts, some of them with a dense layer instead."""

from typing import TYPE_CHECKING

from torch import nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import Decoder, DecoderBlock
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.moe import MoE, SharedExpert
from hornbeam.ops.moe.contract import RoutingRule

if TYPE_CHECKING:
    from hornbeam.models.qwen_moe.spec import QwenMoeConfig


class QwenMoeModel(Decoder):
    """The decoder with experts."""

    def __init__(self, config: "QwenMoeConfig", context: BuildContext) -> None:
        sparse = enumerate(config.sparse_layers)
        blocks = (
            DecoderBlock(config, i, _feed_forward(config, is_sparse, context), context) for i, is_sparse in sparse
        )
        super().__init__(config, blocks, context)


def _feed_forward(config: "QwenMoeConfig", is_sparse: bool, context: BuildContext) -> nn.Module:
    if not is_sparse:
        return GatedMLP(config.hidden_size, config.intermediate_size, context)
    assert config.mixture is not None
    rule = RoutingRule(top_k=config.mixture.top_k, renormalize=config.renormalize)
    shared = None
    if config.shared_size is not None:
        shared = SharedExpert(config.hidden_size, config.shared_size, context, gated=True)
    return MoE(config.hidden_size, config.mixture, rule, context, shared=shared)
