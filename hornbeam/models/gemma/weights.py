"""Which checkpoint tensor fills which parameter. Names are Hugging Face's; GGUF files arrive under the same ones."""

from typing import TYPE_CHECKING

from hornbeam.core.family import Placement

if TYPE_CHECKING:
    from hornbeam.models.gemma.spec import GemmaConfig

_PROJECTIONS = {
    "self_attn.q_proj": ("attention.qkv", 0),
    "self_attn.k_proj": ("attention.qkv", 1),
    "self_attn.v_proj": ("attention.qkv", 2),
    "self_attn.o_proj": ("attention.output", 0),
    "mlp.gate_proj": ("mlp.gate_up", 0),
    "mlp.up_proj": ("mlp.gate_up", 1),
    "mlp.down_proj": ("mlp.down", 0),
}
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}
_QUERY_KEY_NORMS = {"self_attn.q_norm": "attention.norm.query", "self_attn.k_norm": "attention.norm.key"}

# Parts for images, and how newer checkpoints of models with such parts name the tensors of the text part
UNREAD = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
ALIASES = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}


def weight_map(config: "GemmaConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config` that is read, and its place.

    Norms are stored as what they differ from 1 by, but for GGUF files, where that is added already.
    """
    root = "language_model." if config.row.text_part else ""
    norms = _NORMS | _QUERY_KEY_NORMS if config.row.qk_norm else _NORMS

    def norm(parameter: str) -> Placement:
        return Placement(parameter=parameter, transform="none" if config.row.gguf_largest else "add_one")

    places = {
        f"{root}model.embed_tokens.weight": Placement(parameter="embed.weight"),
        f"{root}model.norm.weight": norm("norm.weight"),
    }
    if not config.tie_word_embeddings:
        places[f"{root}lm_head.weight"] = Placement(parameter="head.weight")
    for layer in range(config.num_layers):
        theirs, ours = f"{root}model.layers.{layer}", f"layers.{layer}"
        for source, target in norms.items():
            places[f"{theirs}.{source}.weight"] = norm(f"{ours}.{target}.weight")
        for source, (target, part) in _PROJECTIONS.items():
            for kind in ("weight", "bias") if config.attention_bias and "attn" in source else ("weight",):
                places[f"{theirs}.{source}.{kind}"] = Placement(parameter=f"{ours}.{target}.{kind}", part=part)
    return places
