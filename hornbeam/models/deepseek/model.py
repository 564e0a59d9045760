"""Blocks of latent attention and experts, the first of them with a dense layer instead."""

from typing import TYPE_CHECKING

from torch import nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.decoder import Decoder, DecoderBlock
from hornbeam.layers.mla import LatentAttention
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.moe import MoE, SharedExpert
from hornbeam.ops.moe.contract import RoutingRule

if TYPE_CHECKING:
    from hornbeam.models.deepseek.spec import DeepseekConfig


class DeepseekModel(Decoder):
    """The decoder with latent attention."""

    def __init__(self, config: "DeepseekConfig", context: BuildContext) -> None:
        blocks = (
            DecoderBlock(
                config,
                layer,
                _feed_forward(config, is_sparse, context),
                context,
                LatentAttention(config.latent, layer, context),
            )
            for layer, is_sparse in enumerate(config.sparse_layers)
        )
        super().__init__(config, blocks, context)


def _feed_forward(config: "DeepseekConfig", is_sparse: bool, context: BuildContext) -> nn.Module:
    if not is_sparse:
        return GatedMLP(config.hidden_size, config.intermediate_size, context)
    assert config.mixture is not None
    gate = config.gate
    rule = RoutingRule(
        top_k=config.mixture.top_k,
        scores=gate.scores,
        renormalize=gate.renormalize,
        factor=gate.factor,
        num_groups=gate.num_groups,
        num_kept_groups=gate.num_kept_groups,
        group_score=gate.group_score,
    )
    shared = None
    if config.shared_size:
        shared = SharedExpert(config.hidden_size, config.shared_size, context, gated=False)
    return MoE(config.hidden_size, config.mixture, rule, context, corrected=gate.corrected, shared=shared)
