"""What the family is, as data: decoders whose attention and MLP stand side by side behind one norm.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.family import Placement
from hornbeam.core.windows import parse_slides, parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, read_decoder
from hornbeam.models.cohere.weights import weight_map
from hornbeam.ops.rope.scaling import RopeSettings

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.cohere.model import CohereModel

_WINDOWED = ("Cohere2ForCausalLM", "gguf:cohere2")
_INTERVAL = 4  # of theirs, each so-many-th layer sees everything, and rotates nothing
_DEFAULTS = {"tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 5e5}
_WINDOWED_DEFAULTS = _DEFAULTS | {"sliding_window": 4096, "rope_theta": 1e4}
_GGUF_NORMED_LAYERS = 64  # GGUF files do not tell whether heads are normed; the models with so many layers do it


@dataclass(frozen=True, slots=True, kw_only=True)
class CohereConfig(DecoderConfig):
    """Sizes and switches of one model of the family. `rms_norm_eps` is that of its norms, which subtract the mean."""

    intermediate_size: int
    ropes: tuple[RopeSettings | None, ...]  # how each layer rotates, if it does
    head_norms: bool  # of queries and keys, each head with weights of its own
    logit_scale: float


class CohereFamily:
    """See `core.family.ModelFamily`."""

    name = "cohere"

    def parse(self, hf_config: Mapping[str, Any]) -> CohereConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        architecture = str(hf_config["architectures"][0])
        windowed, gguf = architecture in _WINDOWED, architecture.startswith("gguf:")
        read = ConfigReader({**(_WINDOWED_DEFAULTS if windowed else _DEFAULTS), **hf_config})
        read.only("hidden_act", "silu")
        read.only("quantization_config", None)
        shared = read_decoder(read)
        num_layers, rope = shared["num_layers"], shared["rope"]
        bias = read.switch("attention_bias")
        windows: tuple[int | None, ...] = (None,) * num_layers
        ropes: tuple[RopeSettings | None, ...] = (rope,) * num_layers
        if windowed:
            interval = read.size("sliding_window_pattern", _INTERVAL)
            slides = parse_slides(read, [(layer + 1) % interval != 0 for layer in range(num_layers)])
            windows = parse_windows(read, slides, shared["context_len"])
            ropes = tuple(rope if slide and read.values["sliding_window"] else None for slide in slides)
        return CohereConfig(
            **shared | {"rms_norm_eps": read.number("layer_norm_eps")},
            windows=windows,
            ropes=ropes,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            qkv_bias=bias,
            output_bias=bias,
            head_norms=read.switch("use_qk_norm", gguf and num_layers >= _GGUF_NORMED_LAYERS),
            intermediate_size=read.size("intermediate_size"),
            logit_scale=read.number("logits_scaling" if gguf else "logit_scale"),
        )

    def cache_specs(self, config: CohereConfig) -> tuple[CacheSpec, ...]:
        """See `DecoderConfig.cache_specs`."""
        return config.cache_specs()

    def defaults(self, config: CohereConfig, platform: str) -> Mapping[str, Any]:
        """No preferences."""
        return {}

    def build(self, config: CohereConfig, context: "BuildContext") -> "CohereModel":
        """The model with empty parameters."""
        from hornbeam.models.cohere.model import CohereModel

        return CohereModel(config, context)

    def weight_map(self, config: CohereConfig) -> Mapping[str, Placement]:
        """See `weights.weight_map`."""
        return weight_map(config)


FAMILY = CohereFamily()
