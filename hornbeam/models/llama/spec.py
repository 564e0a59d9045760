"""What the Llama-like dense family is, as data: how its configs are read, what it caches, what it is made of.

Llama and SmolLM2 are rows of it: they differ only in sizes, tied embeddings and rotary settings. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import ModelConfig, Placement
from hornbeam.models.llama.weights import weight_map
from hornbeam.ops.rope.scaling import RopeScaling

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.llama.model import LlamaModel

_DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT_ROPE_THETA = 10000.0  # of configs that name none


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Sizes and switches of one model of the family."""

    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool  # of all four projections
    mlp_bias: bool


class LlamaFamily:
    """See `core.family.ModelFamily`."""

    name = "llama"

    def parse(self, hf_config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        read = _Reader(hf_config)
        num_heads, hidden_size = read.size("num_attention_heads"), read.size("hidden_size")
        head_dim = read.size("head_dim", hidden_size // num_heads)
        num_kv_heads = read.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"the config's {num_heads} heads do not divide over {num_kv_heads} key-value heads")
        read.only("hidden_act", "silu")
        read.only("rotary_dim", head_dim)
        for unsupported in ("sliding_window", "num_local_experts", "quantization_config"):
            read.only(unsupported, None)
        rope_theta, rope_scaling = _parse_rope(read)
        return LlamaConfig(
            architecture=str(hf_config["architectures"][0]),
            num_layers=read.size("num_hidden_layers"),
            hidden_size=hidden_size,
            vocab_size=read.size("vocab_size"),
            context_len=read.size("max_position_embeddings"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=_parse_dtype(read),
            intermediate_size=read.size("intermediate_size"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            attention_bias=read.switch("attention_bias"),
            mlp_bias=read.switch("mlp_bias"),
        )

    def cache_specs(self, config: LlamaConfig) -> tuple[CacheSpec, ...]:
        """One group: every layer keeps keys and values of every token."""
        row = (config.num_kv_heads, config.head_dim)
        layers = tuple(range(config.num_layers))
        return (CacheSpec(kind="full", layers=layers, row_shapes=(row, row), dtype=config.dtype),)

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


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to a config; null counts as absent."""

    values: Mapping[str, Any]

    def size(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"the config's {name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"the config's {name} must be a positive number, not {value!r}")
        return float(value)

    def switch(self, name: str) -> bool:
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"the config's {name} must be true or false, not {value!r}")
        return value

    def only(self, name: str, supported: Any) -> None:
        """Refuse a setting that would change the mathematics."""
        value = self.values.get(name)
        if value not in (None, supported):
            raise ConfigError(f"this family does not implement {name} = {value!r} (only {supported!r})")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise ConfigError(f"the model's config lacks {name}")
        return default if value is None else value


def _parse_dtype(read: _Reader) -> str:
    dtype = read.values.get("dtype") or read.values.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"the config's dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    return str(dtype)


def _parse_rope(read: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_parameters` holds both since transformers 5, before they were two keys."""
    settings = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"the config's rotary settings must be an object, not {settings!r}")
    rope = _Reader(settings)
    rope.only("partial_rotary_factor", 1.0)
    theta = rope.number("rope_theta", read.number("rope_theta", _DEFAULT_ROPE_THETA))
    kind = settings.get("rope_type") or settings.get("type") or "default"
    match kind:
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling(kind="linear", factor=rope.number("factor"))
        case "llama3":
            return theta, RopeScaling(
                kind="wavelength",
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_context_len=rope.size("original_max_position_embeddings"),
            )
    raise ConfigError(f"this family does not implement rotary scaling {kind!r} (only default, linear and llama3)")
