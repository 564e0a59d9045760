"""Which checkpoint tensor fills which parameter; experts come one by one."""

from typing import TYPE_CHECKING

from hornbeam.core.family import Placement
from hornbeam.layers.decoder_config import decoder_weights, expert_weights, mlp_weights

if TYPE_CHECKING:
    from hornbeam.models.qwen_moe.spec import QwenMoeConfig


def weight_map(config: "QwenMoeConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config`, and its place."""
    assert config.mixture is not None
    places = decoder_weights(config)
    for layer, sparse in enumerate(config.sparse_layers):
        theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.mlp"
        if not sparse:
            places |= mlp_weights(theirs, ours)
            continue
        places[f"{theirs}.gate.weight"] = Placement(parameter=f"{ours}.gate.weight")
        places |= expert_weights(f"{theirs}.experts", f"{ours}.experts", config.mixture.num_experts)
        if config.shared_size is not None:
            places |= mlp_weights(f"{theirs}.shared_expert", f"{ours}.shared.mlp")
            places[f"{theirs}.shared_expert_gate.weight"] = Placement(parameter=f"{ours}.shared.share.weight")
    return places
