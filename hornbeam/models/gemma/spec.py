"""What the family is, as data: text models whose layers take turns between a sliding window and everything.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import ModelConfig, Placement
from hornbeam.core.windows import attention_specs, parse_slides, parse_windows
from hornbeam.models.gemma.weights import ALIASES, UNREAD, weight_map
from hornbeam.ops.rope.scaling import RopeSettings, parse_rope, parse_ropes

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.gemma.model import GemmaModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What holds for all models of an architecture, where config.json does not say otherwise."""

    interval: int  # each so-many-th layer sees everything
    qk_norm: bool = False
    window_rope: bool = False  # windowed layers turn by settings of their own
    attention_soft_cap: float | None = None  # None: scores are not capped, whatever the config says
    logits_soft_cap: float | None = None
    text_part: bool = False  # the checkpoint holds more than text: that is under names of its own, and left out
    # GGUF files hold norms as the factors they are, and tell how products are scaled by the number of layers alone:
    # the model with so many has a rule of its own.
    gguf_largest: int | None = None


_SECOND = Row(interval=2, attention_soft_cap=50.0, logits_soft_cap=30.0)
_THIRD = Row(interval=6, qk_norm=True, window_rope=True)
ROWS: dict[str, Row] = {
    "Gemma2ForCausalLM": _SECOND,
    "Gemma3ForCausalLM": _THIRD,
    "Gemma3ForConditionalGeneration": replace(_THIRD, text_part=True),
    "gguf:gemma2": replace(_SECOND, gguf_largest=46),
    "gguf:gemma3": replace(_THIRD, gguf_largest=62),
}
_DEFAULTS = {"sliding_window": 4096}  # what configs may leave out
# What published configs leave out of their text part
_TEXT_DEFAULTS = _DEFAULTS | {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """Sizes and switches of one model of the family."""

    row: Row
    intermediate_size: int
    rms_norm_eps: float
    attention_bias: bool  # of all its projections
    slides: tuple[bool, ...]  # whether each layer is of the kind with a window
    windows: tuple[int | None, ...]  # of each layer; None: it sees everything
    rope: RopeSettings  # of layers that see everything
    window_rope: RopeSettings
    tie_word_embeddings: bool
    logits_soft_cap: float | None


class GemmaFamily:
    """See `core.family.ModelFamily`."""

    name = "gemma"
    aliases = ALIASES

    def parse(self, hf_config: Mapping[str, Any]) -> GemmaConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        architecture = str(hf_config["architectures"][0])
        row = ROWS[architecture]
        read = _text_part(hf_config) if row.text_part else ConfigReader(_DEFAULTS | dict(hf_config))
        read.only("hidden_activation", "gelu_pytorch_tanh")
        read.only("use_bidirectional_attention", False)
        ConfigReader(hf_config).only("quantization_config", None)
        num_layers, hidden_size = read.size("num_hidden_layers", most=MAX_LAYERS), read.size("hidden_size")
        num_heads = read.size("num_attention_heads")
        num_kv_heads, head_dim = read.size("num_key_value_heads", num_heads), read.size("head_dim", 256)
        if num_heads % num_kv_heads:
            raise ConfigError(f"the config's {num_heads} heads do not divide over {num_kv_heads} key-value heads")
        context_len = read.size("max_position_embeddings", most=MAX_POSITIONS)
        scale_divisor = hidden_size / num_heads if num_layers == row.gguf_largest else head_dim
        interval = read.size("sliding_window_pattern", row.interval)
        slides = parse_slides(read, [(layer + 1) % interval != 0 for layer in range(num_layers)])
        rope, window_rope = _ropes(read, row, head_dim, context_len)
        return GemmaConfig(
            architecture=architecture,
            num_layers=num_layers,
            hidden_size=hidden_size,
            vocab_size=read.size("vocab_size"),
            context_len=context_len,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=read.dtype(),
            attention_scale=read.number("query_pre_attn_scalar", scale_divisor) ** -0.5,
            attention_soft_cap=row.attention_soft_cap and _cap(read, "attn_logit_softcapping", row.attention_soft_cap),
            row=row,
            intermediate_size=read.size("intermediate_size"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attention_bias=read.switch("attention_bias"),
            slides=slides,
            windows=parse_windows(read, slides, context_len),
            rope=rope,
            window_rope=window_rope,
            tie_word_embeddings=read.switch("tie_word_embeddings", True),
            logits_soft_cap=_cap(read, "final_logit_softcapping", row.logits_soft_cap),
        )

    def cache_specs(self, config: GemmaConfig) -> tuple[CacheSpec, ...]:
        """Two groups: layers that keep every token, and those that keep their window."""
        return attention_specs(config.windows, config.num_kv_heads, config.head_dim, config.dtype)

    def defaults(self, config: GemmaConfig, platform: str) -> Mapping[str, Any]:
        """No preferences."""
        return {}

    def build(self, config: GemmaConfig, context: "BuildContext") -> "GemmaModel":
        """The model with empty parameters."""
        from hornbeam.models.gemma.model import GemmaModel

        return GemmaModel(config, context)

    def unread(self, config: GemmaConfig) -> tuple[str, ...]:
        """Parts for images."""
        return UNREAD

    def weight_map(self, config: GemmaConfig) -> Mapping[str, Placement]:
        """See `weights.weight_map`."""
        return weight_map(config)


FAMILY = GemmaFamily()


def _text_part(hf_config: Mapping[str, Any]) -> ConfigReader:
    whole = ConfigReader(hf_config)
    text = {name: value for name, value in whole.section("text_config").values.items() if value is not None}
    return ConfigReader({**_TEXT_DEFAULTS, "dtype": whole.dtype(), **text})


def _ropes(read: ConfigReader, row: Row, head_dim: int, context_len: int) -> tuple[RopeSettings, RopeSettings]:
    """Of layers that see everything, and of those with a window."""
    if not row.window_rope:
        return (parse_rope(read, head_dim, context_len),) * 2
    return parse_ropes(read, head_dim, context_len, theta=1e6, window_theta=1e4)


def _cap(read: ConfigReader, name: str, default: float | None) -> float | None:
    """A null in the config means none."""
    return None if read.values.get(name, default) is None else read.number(name, default)
