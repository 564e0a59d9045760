"""What GPT-OSS is, as data: how configs are read, what is cached, how weights are named. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import MixtureShape, Placement
from hornbeam.core.windows import parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, decoder_weights, expert_weights, read_decoder

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.gpt_oss.model import GptOssModel

_KINDS = ("weight", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """The unit of the experts, too; see `ops.moe.contract.GatedUnit`."""

    swiglu_alpha: float
    swiglu_limit: float


class GptOssFamily:
    """See `core.family.ModelFamily`."""

    name = "gpt_oss"

    def parse(self, hf_config: Mapping[str, Any]) -> GptOssConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        read = ConfigReader(_with_scaling(hf_config))
        read.only("hidden_act", "silu")
        read.section("quantization_config").only("quant_method", "mxfp4")
        shared = read_decoder(read)
        mixture = MixtureShape(
            num_experts=read.size("num_local_experts"),
            top_k=read.size("num_experts_per_tok"),
            intermediate_size=read.size("intermediate_size"),
        )
        if mixture.top_k > mixture.num_experts:
            raise ConfigError(f"the config gives each token {mixture.top_k} of {mixture.num_experts} experts")
        bias = read.switch("attention_bias", True)
        every_other = [layer % 2 == 0 for layer in range(shared["num_layers"])]
        return GptOssConfig(
            **shared,
            windows=parse_windows(read, every_other, shared["context_len"]),
            mixture=mixture,
            attention_sinks=True,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            qkv_bias=bias,
            output_bias=bias,
            swiglu_alpha=read.number("swiglu_alpha", 1.702),
            swiglu_limit=read.number("swiglu_limit", 7.0),
        )

    def cache_specs(self, config: GptOssConfig) -> tuple[CacheSpec, ...]:
        """See `DecoderConfig.cache_specs`."""
        return config.cache_specs()

    def defaults(self, config: GptOssConfig, platform: str) -> Mapping[str, Any]:
        """No preferences."""
        return {}

    def build(self, config: GptOssConfig, context: "BuildContext") -> "GptOssModel":
        """The model with empty parameters."""
        from hornbeam.models.gpt_oss.model import GptOssModel

        return GptOssModel(config, context)

    def weight_map(self, config: GptOssConfig) -> Mapping[str, Placement]:
        """Every tensor of a checkpoint of `config`, and its place."""
        places = decoder_weights(config)
        gguf = config.architecture.startswith("gguf:")
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"layers.{layer}.mlp"
            places |= _gguf_mixture(theirs, ours, config) if gguf else _mixture(theirs, ours)
        return places


def _with_scaling(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """GGUF does not tell that the bounds of YaRN's ramp are not rounded here."""
    if not str(hf_config["architectures"][0]).startswith("gguf:") or "rope_scaling" not in hf_config:
        return hf_config
    return {**hf_config, "rope_scaling": {**hf_config["rope_scaling"], "truncate": False}}


def _mixture(theirs: str, ours: str) -> dict[str, Placement]:
    """Outputs of gate and up alternate."""
    gate_up, down = f"{ours}.experts.gate_up", f"{ours}.experts.down"
    router = {f"{theirs}.mlp.router.{kind}": Placement(parameter=f"{ours}.gate.{kind}") for kind in _KINDS}
    return router | {
        f"{theirs}.mlp.experts.gate_up_proj": Placement(
            parameter=f"{gate_up}.weight", part=None, transform="transpose_pairs"
        ),
        f"{theirs}.mlp.experts.gate_up_proj_bias": Placement(parameter=f"{gate_up}.bias", part=None, transform="pairs"),
        f"{theirs}.mlp.experts.down_proj": Placement(parameter=f"{down}.weight", transform="transpose"),
        f"{theirs}.mlp.experts.down_proj_bias": Placement(parameter=f"{down}.bias"),
    }


def _gguf_mixture(theirs: str, ours: str, config: GptOssConfig) -> dict[str, Placement]:
    """Experts one by one; sinks are named like a weight."""
    assert config.mixture is not None
    places = expert_weights(f"{theirs}.mlp.experts", f"{ours}.experts", config.mixture.num_experts)
    biases = {
        name.replace("weight", "bias"): replace(place, parameter=place.parameter.replace("weight", "bias"))
        for name, place in places.items()
    }
    router = {f"{theirs}.mlp.gate.{kind}": Placement(parameter=f"{ours}.gate.{kind}") for kind in _KINDS}
    return places | biases | router


FAMILY = GptOssFamily()
