"""Which checkpoint tensor fills which parameter. Names are Hugging Face's; GGUF files arrive under the same ones."""

from typing import TYPE_CHECKING

from hornbeam.core.family import Placement

if TYPE_CHECKING:
    from hornbeam.models.llama.spec import LlamaConfig

# below a layer: (checkpoint module, parameter's module, part of it, the switch that gives it a bias)
_PROJECTIONS = (
    ("self_attn.q_proj", "attention.qkv", 0, "attention"),
    ("self_attn.k_proj", "attention.qkv", 1, "attention"),
    ("self_attn.v_proj", "attention.qkv", 2, "attention"),
    ("self_attn.o_proj", "attention.output", 0, "attention"),
    ("mlp.gate_proj", "mlp.gate_up", 0, "mlp"),
    ("mlp.up_proj", "mlp.gate_up", 1, "mlp"),
    ("mlp.down_proj", "mlp.down", 0, "mlp"),
)
_NORMS = (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm"))


def weight_map(config: "LlamaConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config`, and its place."""
    places = {
        "model.embed_tokens.weight": Placement(parameter="embed.weight"),
        "model.norm.weight": Placement(parameter="norm.weight"),
    }
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Placement(parameter="head.weight")
    has_bias = {"attention": config.attention_bias, "mlp": config.mlp_bias}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for source, target in _NORMS:
            places[f"{theirs}.{source}.weight"] = Placement(parameter=f"{ours}.{target}.weight")
        for source, target, part, switch in _PROJECTIONS:
            for kind in ("weight", "bias") if has_bias[switch] else ("weight",):
                places[f"{theirs}.{source}.{kind}"] = _place(config, f"{ours}.{target}.{kind}", source, part)
    return places


def _place(config: "LlamaConfig", parameter: str, source: str, part: int) -> Placement:
    """GGUF files of this family keep the rows of queries and keys in the order of their own rotation."""
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(source)
    if heads is None or not config.architecture.startswith("gguf:"):
        return Placement(parameter=parameter, part=part)
    return Placement(parameter=parameter, part=part, transform="unpermute_heads", heads=heads)
