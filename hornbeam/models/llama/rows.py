"""The models of the Llama-like family, as rows: how each differs from Llama. Imports no torch.

A difference that a config states by itself (sizes, rotary settings, biases by the usual switches) is no column here.
"""

from dataclasses import dataclass
from typing import Literal

Layout = Literal["separate", "fused", "fused_up", "grouped"]  # of a checkpoint's projections; see `weights`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What holds for all models of an architecture, where config.json does not say otherwise."""

    layout: Layout = "separate"
    tied_head: bool = False
    qkv_bias: bool | None = None  # None: as the config's attention_bias says, which then holds for the output too
    qk_norm: Literal["none", "head", "whole"] = "none"
    post_norm: bool = False
    multipliers: bool = False  # of embeddings, residuals, attention and logits, by the config
    paired_rotation: bool = False  # rows of queries and keys are ordered for a rotation of neighbours
    plain_layer_interval: int | None = None  # each so-many-th layer rotates nothing
    # Layers whose window the config's sliding_window is, if it lists no kinds of layers; without "all" only where its
    # use_sliding_window is on. last: from max_window_layers on; plain: those that rotate nothing
    windows: Literal["all", "last", "plain"] = "all"


ROWS: dict[str, Row] = {
    "LlamaForCausalLM": Row(),
    "MistralForCausalLM": Row(),
    "Qwen2ForCausalLM": Row(qkv_bias=True, windows="last"),
    "Qwen3ForCausalLM": Row(qk_norm="head", windows="last"),
    "SmolLM3ForCausalLM": Row(tied_head=True, plain_layer_interval=4, windows="plain"),
    "Phi3ForCausalLM": Row(layout="fused"),
    "GraniteForCausalLM": Row(multipliers=True),
    "Olmo2ForCausalLM": Row(qk_norm="whole", post_norm=True),
    "InternLM2ForCausalLM": Row(layout="grouped"),
    "SeedOssForCausalLM": Row(qkv_bias=True),
    "gguf:llama": Row(paired_rotation=True),
    "gguf:qwen2": Row(qkv_bias=True),
    "gguf:qwen3": Row(qk_norm="head"),
    "gguf:smollm3": Row(plain_layer_interval=4, paired_rotation=True),
    "gguf:phi3": Row(layout="fused_up"),
    "gguf:granite": Row(multipliers=True, paired_rotation=True),
    "gguf:olmo2": Row(qk_norm="whole", post_norm=True),
    "gguf:internlm2": Row(paired_rotation=True),
}
