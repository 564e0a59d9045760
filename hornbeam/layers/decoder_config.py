"""What families made of `layers.decoder` share before there is a model: sizes, cache groups, names of weights.

Imports no torch. Names of weights are Hugging Face's usual ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import LatentSizes, ModelConfig, Placement
from hornbeam.core.windows import attention_specs
from hornbeam.ops.rope.scaling import RopeSettings, YarnScaling, parse_rope

_PROJECTIONS = {
    "q_proj": ("attention.qkv", 0),
    "k_proj": ("attention.qkv", 1),
    "v_proj": ("attention.qkv", 2),
    "o_proj": ("attention.output", 0),
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_QUERY_KEY_NORMS = {"self_attn.q_norm": "attention.norm.query", "self_attn.k_norm": "attention.norm.key"}
_MLP = {"gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape(LatentSizes):
    """A layer of latent attention."""

    hidden_size: int
    num_heads: int
    query_rank: int | None  # features of the queries' latent; None: queries are projected at once
    eps: float  # of the norms of latents
    bias: bool  # of the projections from and to hidden rows


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Sizes and switches of blocks of attention and something behind it."""

    rms_norm_eps: float
    rope: RopeSettings
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # of each layer; None: it sees everything
    qkv_bias: bool = False
    output_bias: bool = False  # of attention
    qk_norm: Literal["none", "head", "whole"] = "none"  # over each head, or over all heads of a token

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """A group of layers that keep keys and values of every token, and one of those that keep their window's."""
        return attention_specs(self.windows, self.num_kv_heads, self.head_dim, self.dtype)


def read_decoder(read: ConfigReader, *, partial_rotary: bool = False) -> dict[str, Any]:
    """The fields of `DecoderConfig` that every Hugging Face config of a decoder states in the same way.

    partial_rotary: see `parse_rope`.

    Raises:
        ConfigError: something is missing or malformed.
    """
    num_heads, hidden_size = read.size("num_attention_heads"), read.size("hidden_size")
    head_dim = read.size("head_dim", hidden_size // num_heads)
    num_kv_heads = read.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"the config's {num_heads} heads do not divide over {num_kv_heads} key-value heads")
    context_len = read.size("max_position_embeddings", most=MAX_POSITIONS)
    rope = parse_rope(read, head_dim, context_len, partial=partial_rotary)
    if isinstance(rope.scaling, YarnScaling):
        context_len = max(context_len, int(rope.scaling.factor * rope.scaling.original_context_len))
        if context_len > MAX_POSITIONS:
            raise ConfigError(f"the config's rotary scaling makes a context of {context_len} positions")
    return {
        "architecture": str(read.values["architectures"][0]),
        "num_layers": read.size("num_hidden_layers", most=MAX_LAYERS),
        "hidden_size": hidden_size,
        "vocab_size": read.size("vocab_size"),
        "context_len": context_len,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "dtype": read.dtype(),
        "rms_norm_eps": read.number("rms_norm_eps", 1e-6),
        "rope": rope,
    }


def frame_weights(config: DecoderConfig) -> dict[str, Placement]:
    """All but attention and what stands behind it: embedding, head, norms of hidden rows."""
    places = {
        "model.embed_tokens.weight": Placement(parameter="embed.weight"),
        "model.norm.weight": Placement(parameter="norm.weight"),
    }
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Placement(parameter="head.weight")
    for layer in range(config.num_layers):
        for source, target in _NORMS.items():
            places[f"model.layers.{layer}.{source}.weight"] = Placement(parameter=f"layers.{layer}.{target}.weight")
    return places


def decoder_weights(config: DecoderConfig) -> dict[str, Placement]:
    """All but what stands behind attention."""
    places = frame_weights(config)
    biased = {"attention.qkv": config.qkv_bias, "attention.output": config.output_bias}
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        for source, target in _QUERY_KEY_NORMS.items() if config.qk_norm != "none" else ():
            places[f"{theirs}.{source}.weight"] = Placement(parameter=f"{ours}.{target}.weight")
        for source, (target, part) in _PROJECTIONS.items():
            for kind in ("weight", "bias") if biased[target] else ("weight",):
                places[f"{theirs}.self_attn.{source}.{kind}"] = Placement(
                    parameter=f"{ours}.{target}.{kind}", part=part
                )
        if config.attention_sinks:
            places[f"{theirs}.self_attn.sinks"] = Placement(parameter=f"{ours}.attention.sinks")
    return places


def mlp_weights(theirs: str, ours: str) -> dict[str, Placement]:
    """Of a gated layer without biases, under the modules' names in the checkpoint and in the model."""
    return {
        f"{theirs}.{source}.weight": Placement(parameter=f"{ours}.{target}.weight", part=part)
        for source, (target, part) in _MLP.items()
    }


def expert_weights(
    theirs: str, ours: str, num_experts: int, names: Iterable[str] = tuple(_MLP)
) -> dict[str, Placement]:
    """Of routed experts that the checkpoint holds one by one; `names` are its names of gate, up and down."""
    return {
        f"{theirs}.{expert}.{name}.weight": Placement(parameter=f"{ours}.{target}.weight", part=part, expert=expert)
        for expert in range(num_experts)
        for name, (target, part) in zip(names, _MLP.values(), strict=True)
    }
