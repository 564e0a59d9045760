"""What the Llama-like dense family is, as data: how its configs are read, what it caches, what it is made of.

Which models it serves, and how they differ, stands in `rows`. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.family import Placement
from hornbeam.core.windows import parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, read_decoder
from hornbeam.models.llama.rows import ROWS, Layout, Row
from hornbeam.models.llama.weights import weight_map

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.llama.model import LlamaModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and switches of one model of the family."""

    layout: Layout  # of the checkpoint's projections
    paired_rotation: bool  # of the checkpoint's queries and keys
    intermediate_size: int
    rotary_layers: tuple[bool, ...]  # whether each layer rotates
    mlp_bias: bool
    post_norm: bool  # norms behind attention and MLP instead of before them
    embedding_multiplier: float
    residual_multiplier: float  # of what attention and MLP add
    logits_divisor: float


class LlamaFamily:
    """See `core.family.ModelFamily`."""

    name = "llama"

    def parse(self, hf_config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        read = ConfigReader(hf_config)
        architecture = str(hf_config["architectures"][0])
        row = ROWS.get(architecture, Row())
        _refuse_other_mathematics(read)
        shared = read_decoder(read)
        rotary_layers = _rotary_layers(read, row, shared["num_layers"])
        attention_bias = read.switch("attention_bias")
        multiplier = _multipliers(read) if row.multipliers else {}
        return LlamaConfig(
            **shared,
            attention_scale=multiplier.get("attention_multiplier"),
            layout=row.layout,
            paired_rotation=row.paired_rotation,
            intermediate_size=read.size("intermediate_size"),
            rotary_layers=rotary_layers,
            windows=_windows(read, row, rotary_layers, shared["context_len"]),
            tie_word_embeddings=read.switch("tie_word_embeddings", row.tied_head),
            qkv_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
            output_bias=attention_bias and row.qkv_bias is None,
            mlp_bias=read.switch("mlp_bias"),
            qk_norm=row.qk_norm,
            post_norm=row.post_norm,
            embedding_multiplier=multiplier.get("embedding_multiplier", 1.0),
            residual_multiplier=multiplier.get("residual_multiplier", 1.0),
            logits_divisor=multiplier.get("logits_scaling", 1.0),
        )

    def cache_specs(self, config: LlamaConfig) -> tuple[CacheSpec, ...]:
        """One group, or two: layers keep keys and values of every token, or those of their window."""
        return config.cache_specs()

    def defaults(self, config: LlamaConfig, platform: str) -> Mapping[str, Any]:
        """No preferences."""
        return {}

    def build(self, config: LlamaConfig, context: "BuildContext") -> "LlamaModel":
        """The model with empty parameters."""
        from hornbeam.models.llama.model import LlamaModel

        return LlamaModel(config, context)

    def weight_map(self, config: LlamaConfig) -> Mapping[str, Placement]:
        """See `weights.weight_map`."""
        return weight_map(config)


FAMILY = LlamaFamily()


def _refuse_other_mathematics(read: ConfigReader) -> None:
    read.only("hidden_act", "silu")
    read.only("bias", False)
    for unsupported in ("num_local_experts", "quantization_config"):
        read.only(unsupported, None)


def _multipliers(read: ConfigReader) -> dict[str, float]:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return {name: read.number(name, 1.0) for name in names}


def _windows(read: ConfigReader, row: Row, rotary_layers: tuple[bool, ...], context_len: int) -> tuple[int | None, ...]:
    num_layers = len(rotary_layers)
    if row.windows == "all":
        return parse_windows(read, (True,) * num_layers, context_len)
    if not read.switch("use_sliding_window"):
        return (None,) * num_layers
    if row.windows == "plain":
        return parse_windows(read, [not rotates for rotates in rotary_layers], context_len)
    first = read.size("max_window_layers", 28, least=0)
    return parse_windows(read, [layer >= first for layer in range(num_layers)], context_len)


def _rotary_layers(read: ConfigReader, row: Row, num_layers: int) -> tuple[bool, ...]:
    """The config lists 1 for layers that rotate (under `no_rope_layers`), or leaves out every so-many-th."""
    if row.plain_layer_interval is None:
        return (True,) * num_layers
    if read.values.get("no_rope_layers") is not None:
        return tuple(flag != 0 for flag in read.numbers("no_rope_layers", num_layers))
    interval = read.size("no_rope_layer_interval", row.plain_layer_interval)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
