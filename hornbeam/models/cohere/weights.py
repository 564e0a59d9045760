"""Which checkpoint tensor fills which parameter. Names are Hugging Face's; GGUF files arrive under the same ones.

Both rotate neighbouring features of queries and keys, ours those that are half a head apart: rows are reordered.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from hornbeam.core.family import Placement
from hornbeam.layers.decoder_config import decoder_weights, mlp_weights

if TYPE_CHECKING:
    from hornbeam.models.cohere.spec import CohereConfig


def weight_map(config: "CohereConfig") -> dict[str, Placement]:
    """Every tensor of a checkpoint of `config`, and its place."""
    places = decoder_weights(config)
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        del places[f"{theirs}.post_attention_layernorm.weight"]
        places |= mlp_weights(f"{theirs}.mlp", f"{ours}.mlp")
        for kind, num_heads in heads.items():
            names = [f"{theirs}.self_attn.{kind}_proj.{part}" for part in ("weight", "bias")]
            if config.head_norms:
                names.append(f"{theirs}.self_attn.{kind}_norm.weight")
                places[names[-1]] = Placement(parameter=f"{ours}.{'query' if kind == 'q' else 'key'}_norm.weight")
            for name in places.keys() & names:
                places[name] = replace(places[name], transform="unpermute_heads", heads=num_heads)
    return places
