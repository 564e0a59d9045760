"""Which checkpoint tensor fills which parameter; experts come one by one."""

from typing import TYPE_CHECKING

from hornbeam.core.family import Placement
from hornbeam.layers.decoder_config import expert_weights, frame_weights, mlp_weights
from hornbeam.models.deepseek.gguf import ARCHITECTURE as GGUF

if TYPE_CHECKING:
    from hornbeam.models.deepseek.spec import DeepseekConfig

_ATTENTION = {
    "kv_a_proj_with_mqa": ("qkv", 1),
    "kv_a_layernorm": ("latent_norm", 0),
    "kv_b_proj": ("up", 0),
    "o_proj": ("output", 0),
}
_QUERY = {"q_proj": ("qkv", 0)}
_LATENT_QUERY = {"q_a_proj": ("qkv", 0), "q_a_layernorm": ("query_norm", 0), "q_b_proj": ("query", 0)}
_BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")


def weight_map(config: "DeepseekConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config`, and its place."""
    assert config.mixture is not None
    places = frame_weights(config)
    modules = _ATTENTION | (_QUERY if config.latent.query_rank is None else _LATENT_QUERY)
    for layer, is_sparse in enumerate(config.sparse_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for source, (target, part) in modules.items():
            for kind in ("weight", "bias") if config.latent.bias and source in _BIASED else ("weight",):
                places[f"{theirs}.self_attn.{source}.{kind}"] = Placement(
                    parameter=f"{ours}.attention.{target}.{kind}", part=part
                )
        theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
        if not is_sparse:
            places |= mlp_weights(theirs, ours)
            continue
        places[f"{theirs}.gate.weight"] = Placement(parameter=f"{ours}.gate.weight")
        if config.gate.corrected:
            places[f"{theirs}.gate.e_score_correction_bias"] = Placement(parameter=f"{ours}.correction")
        places |= expert_weights(f"{theirs}.experts", f"{ours}.experts", config.mixture.num_experts)
        if config.shared_size:
            name = "shared_expert" if config.architecture == GGUF else "shared_experts"
            places |= mlp_weights(f"{theirs}.{name}", f"{ours}.shared.mlp")
    return places
