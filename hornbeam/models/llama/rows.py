"""The models of the Llama-like family, as rows: how each differs from Llama. Imports no torch.

A difference that a config states by itself (sizes, rotary settings, biases by the usual switches) is no column here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["separate", "fused", "fused_up", "grouped"]  # of a checkpoint's projections; see `weights`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What holds for all models of an architecture, where config.json does not say otherwise."""

    layout: Layout = "separate"
    qkv_bias: bool | None = None  # None: as the config's attention_bias says, which then holds for the output too
    qk_norm: Literal["none", "head", "whole"] = "none"
    post_norm: bool = False
    multipliers: bool = False  # of embeddings, residuals, attention and logits, by the config
    paired_rotation: bool = False  # rows of queries and keys are ordered for a rotation of neighbours
    partial_rotary: bool = False  # the config's partial_rotary_factor counts
    # Layers that rotate nothing: none; each fourth, or as the config says; those without a window, if others have one
    plain: Literal["none", "listed", "full"] = "none"
    window_rope: bool = False  # layers with a window rotate by settings of their own
    # Layers whose window the config's sliding_window is, where it does not list the kinds of layers. all, none, or all
    # but each fourth; and, only where use_sliding_window is on, from max_window_layers on, or those that rotate nothing
    windows: Literal["all", "none", "most", "last", "plain"] = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of settings that a config may leave out


ROWS: dict[str, Row] = {
    "LlamaForCausalLM": Row(),
    "MistralForCausalLM": Row(windows="all", defaults={"sliding_window": 4096}),
    "MinistralForCausalLM": Row(windows="all", defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Row(qkv_bias=True, windows="last"),
    "Qwen3ForCausalLM": Row(qk_norm="head", windows="last", defaults={"head_dim": 128}),
    "SmolLM3ForCausalLM": Row(
        plain="listed", windows="plain", defaults={"tie_word_embeddings": True, "rope_theta": 2e6}
    ),
    "Phi3ForCausalLM": Row(layout="fused", partial_rotary=True, windows="all", defaults={"rms_norm_eps": 1e-5}),
    "GraniteForCausalLM": Row(multipliers=True),
    "Olmo2ForCausalLM": Row(qk_norm="whole", post_norm=True, defaults={"rms_norm_eps": 1e-5}),
    "Olmo3ForCausalLM": Row(
        qk_norm="whole",
        post_norm=True,
        window_rope=True,
        windows="most",
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
    ),
    "Exaone4ForCausalLM": Row(
        qk_norm="head",
        post_norm=True,
        plain="full",
        windows="most",
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "InternLM2ForCausalLM": Row(layout="grouped"),
    "SeedOssForCausalLM": Row(defaults={"attention_bias": True, "attention_out_bias": False, "head_dim": 128}),
    "gguf:llama": Row(paired_rotation=True),
    "gguf:qwen2": Row(qkv_bias=True),
    "gguf:qwen3": Row(qk_norm="head"),
    "gguf:smollm3": Row(plain="listed", paired_rotation=True),
    "gguf:phi3": Row(layout="fused_up", windows="all"),
    "gguf:granite": Row(multipliers=True, paired_rotation=True),
    "gguf:olmo2": Row(qk_norm="whole", post_norm=True, window_rope=True),
    "gguf:exaone4": Row(qk_norm="head", post_norm=True, plain="full", windows="most"),
    "gguf:internlm2": Row(paired_rotation=True),
    "gguf:seed_oss": Row(),
}
