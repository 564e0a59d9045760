"""What the Llama-like dense family is, as data: how its configs are read, what it caches, what it is made of.

Which models it serves, and how they differ, stands in `rows`. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.family import Placement
from hornbeam.core.fp8 import read_fp8
from hornbeam.core.windows import parse_slides, parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, read_decoder
from hornbeam.models.llama.rows import ROWS, Layout, Row
from hornbeam.models.llama.weights import weight_map
from hornbeam.ops.rope.scaling import RopeSettings, parse_ropes

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.llama.model import LlamaModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and switches of one model of the family."""

    layout: Layout  # of the checkpoint's projections
    paired_rotation: bool  # of the checkpoint's queries and keys
    intermediate_size: int
    ropes: tuple[RopeSettings | None, ...]  # how each layer rotates, if it does
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
        row = ROWS.get(str(hf_config["architectures"][0]), Row())
        read = ConfigReader({**row.defaults, **hf_config})
        _refuse_other_mathematics(read)
        shared = read_decoder(read, partial_rotary=row.partial_rotary)
        ropes, windows = _layers(read, row, shared)
        attention_bias = read.switch("attention_bias")
        multiplier = _multipliers(read) if row.multipliers else {}
        return LlamaConfig(
            **shared,
            fp8=read_fp8(read),
            attention_scale=multiplier.get("attention_multiplier"),
            layout=row.layout,
            paired_rotation=row.paired_rotation,
            intermediate_size=read.size("intermediate_size"),
            ropes=ropes,
            windows=windows,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            qkv_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
            output_bias=row.qkv_bias is None and read.switch("attention_out_bias", attention_bias),
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
    read.only("num_local_experts", None)


def _multipliers(read: ConfigReader) -> dict[str, float]:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    return {name: read.number(name, 1.0) for name in names}


def _layers(
    read: ConfigReader, row: Row, shared: Mapping[str, Any]
) -> tuple[tuple[RopeSettings | None, ...], tuple[int | None, ...]]:
    """How each layer rotates, and its window."""
    num_layers, context_len, full = shared["num_layers"], shared["context_len"], shared["rope"]
    rotates = _listed_rotations(read, num_layers) if row.plain == "listed" else (True,) * num_layers
    if row.windows in ("last", "plain") and not read.switch("use_sliding_window"):
        return tuple(full if turns else None for turns in rotates), (None,) * num_layers
    slides = parse_slides(read, _slides(read, row, rotates)) if read.values.get("sliding_window") else ()
    window_rope = full
    if row.window_rope:
        full, window_rope = parse_ropes(read, shared["head_dim"], context_len, theta=full.theta)
    ropes = [window_rope if slide else full for slide in slides] or [full] * num_layers
    if slides and row.plain == "full":
        rotates = slides
    windows = parse_windows(read, slides or (False,) * num_layers, context_len)
    return tuple(rope if turns else None for rope, turns in zip(ropes, rotates, strict=True)), windows


def _slides(read: ConfigReader, row: Row, rotates: tuple[bool, ...]) -> list[bool]:
    """Which layers have a window, if the config does not list them."""
    layers = range(len(rotates))
    match row.windows:
        case "all" | "none":
            return [row.windows == "all" for _ in layers]
        case "most":
            interval = read.size("sliding_window_pattern", 4)
            return [(layer + 1) % interval != 0 for layer in layers]
        case "last":
            return [layer >= read.size("max_window_layers", 28, least=0) for layer in layers]
        case "plain":
            return [not turns for turns in rotates]


def _listed_rotations(read: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """The config lists 1 for layers that rotate (under `no_rope_layers`), or leaves out every so-many-th."""
    if read.values.get("no_rope_layers") is not None:
        return tuple(flag != 0 for flag in read.numbers("no_rope_layers", num_layers))
    interval = read.size("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
