"""Which checkpoint tensor fills which parameter. Names are Hugging Face's; GGUF files arrive under the same ones.

Layouts of a checkpoint's projections: "separate" (one tensor each), "fused" (queries, keys and values in one, gate and
up in another), "fused_up" (the same, where gate and up go by the name of up), "grouped" (queries, keys and values in
one, key-value head by head, under names of their own).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hornbeam.core.family import Placement

if TYPE_CHECKING:
    from hornbeam.models.llama.rows import Layout
    from hornbeam.models.llama.spec import LlamaConfig

_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True, slots=True)
class _Names:
    """Below a layer: checkpoint module -> (parameter's module, part); and the names of norms and of embeddings."""

    projections: dict[str, tuple[str, int | None]]
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")  # of attention, of the MLP
    embedding: str = _EMBEDDING
    head: str = _HEAD


_NAMES: dict["Layout", _Names] = {
    "separate": _Names(
        {
            "self_attn.q_proj": ("attention.qkv", 0),
            "self_attn.k_proj": ("attention.qkv", 1),
            "self_attn.v_proj": ("attention.qkv", 2),
            "self_attn.o_proj": ("attention.output", 0),
            "mlp.gate_proj": ("mlp.gate_up", 0),
            "mlp.up_proj": ("mlp.gate_up", 1),
            "mlp.down_proj": ("mlp.down", 0),
        }
    ),
    "fused": _Names(
        {
            "self_attn.qkv_proj": ("attention.qkv", None),
            "self_attn.o_proj": ("attention.output", 0),
            "mlp.gate_up_proj": ("mlp.gate_up", None),
            "mlp.down_proj": ("mlp.down", 0),
        }
    ),
    "fused_up": _Names(
        {
            "self_attn.qkv_proj": ("attention.qkv", None),
            "self_attn.o_proj": ("attention.output", 0),
            "mlp.up_proj": ("mlp.gate_up", None),
            "mlp.down_proj": ("mlp.down", 0),
        }
    ),
    "grouped": _Names(
        {
            "attention.wqkv": ("attention.qkv", None),
            "attention.wo": ("attention.output", 0),
            "feed_forward.w1": ("mlp.gate_up", 0),
            "feed_forward.w3": ("mlp.gate_up", 1),
            "feed_forward.w2": ("mlp.down", 0),
        },
        norms=("attention_norm", "ffn_norm"),
        embedding="model.tok_embeddings",
        head="output",
    ),
}
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_QUERY_KEY_NORMS = {"self_attn.q_norm": "attention.norm.query", "self_attn.k_norm": "attention.norm.key"}


def weight_map(config: "LlamaConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config`, and its place."""
    names = _NAMES[config.layout]
    places = {
        f"{names.embedding}.weight": Placement(parameter="embed.weight"),
        f"{_FINAL_NORM}.weight": Placement(parameter="norm.weight"),
    }
    if not config.tie_word_embeddings:
        places[f"{names.head}.weight"] = Placement(parameter="head.weight")
    attention_norm, mlp_norm = _POST_NORMS if config.post_norm else names.norms
    norms = {attention_norm: "attention_norm", mlp_norm: "mlp_norm"}
    if config.qk_norm != "none":
        norms |= _QUERY_KEY_NORMS
    biased = {"attention.qkv": config.qkv_bias, "attention.output": config.output_bias}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for source, target in norms.items():
            places[f"{theirs}.{source}.weight"] = Placement(parameter=f"{ours}.{target}.weight")
        for source, (target, part) in names.projections.items():
            for kind in ("weight", "bias") if biased.get(target, config.mlp_bias) else ("weight",):
                places[f"{theirs}.{source}.{kind}"] = _place(config, f"{ours}.{target}.{kind}", source, part)
    return places


def _place(config: "LlamaConfig", parameter: str, source: str, part: int | None) -> Placement:
    """Where rows of queries and keys are ordered otherwise, the loader reorders them.

    That is in grouped tensors, and in those GGUF files whose rotation pairs neighbouring rows.
    """
    if source == "attention.wqkv":
        heads, head_dim = config.num_kv_heads, config.head_dim
        return Placement(parameter=parameter, part=part, transform="ungroup_heads", heads=heads, head_dim=head_dim)
    permuted = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    if source in permuted and config.paired_rotation:
        return Placement(parameter=parameter, part=part, transform="unpermute_heads", heads=permuted[source])
    return Placement(parameter=parameter, part=part)
