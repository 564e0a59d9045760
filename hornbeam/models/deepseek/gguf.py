"""What metadata of GGUF files says of the family's models, in the terms of config.json."""

from collections.abc import Mapping
from typing import Any

from hornbeam.core.errors import ConfigError

ARCHITECTURE = "gguf:deepseek2+experts"  # of all versions
_SIGMOID = 2  # of expert_gating_func


def with_usual_names(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same settings, if they come from such a file. Raises ConfigError if one is missing."""
    if hf_config["architectures"][0] != ARCHITECTURE:
        return hf_config
    try:
        rope_dim = hf_config["rotary_dim"]
        key_dim = hf_config.get("qk_head_dim") or hf_config["head_dim"]
        value_dim = hf_config.get("v_head_dim") or hf_config["value_length"]
        num_experts = hf_config["num_local_experts"]
    except KeyError as error:
        raise ConfigError(f"the file's metadata lacks what gives {error}; convert the model again") from error
    method = "group_limited_greedy" if hf_config.get("n_group", 1) > 1 else "greedy"
    sizes = {"qk_rope_head_dim": rope_dim, "qk_nope_head_dim": key_dim - rope_dim, "v_head_dim": value_dim}
    routing = {"n_routed_experts": num_experts, "topk_method": "noaux_tc" if has_sigmoid(hf_config) else method}
    return {**hf_config, **sizes, **routing, "rotary_dim": None}


def has_sigmoid(hf_config: Mapping[str, Any]) -> bool:
    """Whether experts are scored as from the third version on."""
    return bool(hf_config.get("expert_gating_func") == _SIGMOID)
