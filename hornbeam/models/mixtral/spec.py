"""What Mixtral is, as data: how configs are read, what is cached. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import MixtureShape, Placement
from hornbeam.core.fp8 import read_fp8
from hornbeam.core.windows import parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, decoder_weights, expert_weights, read_decoder

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.mixtral.model import MixtralModel

_NAMES = ("w1", "w3", "w2")  # of gate, up and down


class MixtralFamily:
    """See `core.family.ModelFamily`."""

    name = "mixtral"

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        read = ConfigReader(hf_config)
        read.only("hidden_act", "silu")
        shared = read_decoder(read)
        mixture = MixtureShape(
            num_experts=read.size("num_local_experts"),
            top_k=read.size("num_experts_per_tok"),
            intermediate_size=read.size("intermediate_size"),
        )
        if mixture.top_k > mixture.num_experts:
            raise ConfigError(f"the config gives each token {mixture.top_k} of {mixture.num_experts} experts")
        return DecoderConfig(
            **shared,
            fp8=read_fp8(read),
            windows=parse_windows(read, (True,) * shared["num_layers"], shared["context_len"]),
            mixture=mixture,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
        )

    def cache_specs(self, config: DecoderConfig) -> tuple[CacheSpec, ...]:
        """See `DecoderConfig.cache_specs`."""
        return config.cache_specs()

    def defaults(self, config: DecoderConfig, platform: str) -> Mapping[str, Any]:
        """No preferences."""
        return {}

    def build(self, config: DecoderConfig, context: "BuildContext") -> "MixtralModel":
        """The model with empty parameters."""
        from hornbeam.models.mixtral.model import MixtralModel

        return MixtralModel(config, context)

    def weight_map(self, config: DecoderConfig) -> Mapping[str, Placement]:
        """Every tensor of a checkpoint of `config`, and its place."""
        assert config.mixture is not None
        places = decoder_weights(config)
        gguf = config.architecture.startswith("gguf:")
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"layers.{layer}.mlp"
            mixture, names = ("mlp", ("gate_proj", "up_proj", "down_proj")) if gguf else ("block_sparse_moe", _NAMES)
            places[f"{theirs}.{mixture}.gate.weight"] = Placement(parameter=f"{ours}.gate.weight")
            num_experts = config.mixture.num_experts
            places |= expert_weights(f"{theirs}.{mixture}.experts", f"{ours}.experts", num_experts, names)
            heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if gguf else {}
            for projection, num_heads in heads.items():
                name = f"{theirs}.self_attn.{projection}.weight"
                places[name] = replace(places[name], transform="unpermute_heads", heads=num_heads)
        return places


FAMILY = MixtralFamily()
