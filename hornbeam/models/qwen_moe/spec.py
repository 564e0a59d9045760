"""What Qwen's mixtures of experts are, as data: how configs are read, what is cached. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import MixtureShape, Placement
from hornbeam.core.fp8 import read_fp8
from hornbeam.core.windows import parse_windows
from hornbeam.layers.decoder_config import DecoderConfig, read_decoder
from hornbeam.models.qwen_moe.weights import weight_map

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.qwen_moe.model import QwenMoeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How an architecture differs where config.json does not say so."""

    qkv_bias: bool | None  # where the config has no qkv_bias; None: as its attention_bias says, the output's too
    qk_norm: Literal["none", "head"]
    shared_expert: bool
    renormalize: bool = False  # where the config has no norm_topk_prob


ROWS: dict[str, Row] = {
    "Qwen2MoeForCausalLM": Row(qkv_bias=True, qk_norm="none", shared_expert=True),
    "Qwen3MoeForCausalLM": Row(qkv_bias=None, qk_norm="head", shared_expert=False),
    "gguf:qwen2moe+experts": Row(qkv_bias=True, qk_norm="none", shared_expert=True),
    "gguf:qwen3moe+experts": Row(qkv_bias=None, qk_norm="head", shared_expert=False, renormalize=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenMoeConfig(DecoderConfig):
    """Sizes and switches of one model of the family."""

    intermediate_size: int  # of dense layers
    sparse_layers: tuple[bool, ...]  # whether each layer has experts
    renormalize: bool  # weights of a token's experts sum to 1
    shared_size: int | None  # of the expert that every token takes, in a share of its own; None: there is none


class QwenMoeFamily:
    """See `core.family.ModelFamily`."""

    name = "qwen_moe"

    def parse(self, hf_config: Mapping[str, Any]) -> QwenMoeConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        read = ConfigReader(hf_config)
        shared = read_decoder(read)
        row = ROWS[shared["architecture"]]
        read.only("hidden_act", "silu")
        num_layers = shared["num_layers"]
        windows: tuple[int | None, ...] = (None,) * num_layers
        if read.switch("use_sliding_window"):
            windows = parse_windows(read, _default_windows(read, row, num_layers), shared["context_len"])
        attention_bias = read.switch("attention_bias")
        mixture = MixtureShape(
            num_experts=read.size("num_experts", read.size("num_local_experts", 0, least=0)),
            top_k=read.size("num_experts_per_tok"),
            intermediate_size=read.size("moe_intermediate_size"),
        )
        if mixture.top_k > mixture.num_experts:
            raise ConfigError(f"the config gives each token {mixture.top_k} of {mixture.num_experts} experts")
        return QwenMoeConfig(
            **shared,
            fp8=read_fp8(read),
            windows=windows,
            mixture=mixture,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            qkv_bias=attention_bias if row.qkv_bias is None else read.switch("qkv_bias", row.qkv_bias),
            output_bias=attention_bias and row.qkv_bias is None,
            qk_norm=row.qk_norm,
            intermediate_size=read.size("intermediate_size"),
            sparse_layers=_sparse_layers(read, num_layers),
            renormalize=read.switch("norm_topk_prob", row.renormalize),
            shared_size=read.size("shared_expert_intermediate_size") if row.shared_expert else None,
        )

    def cache_specs(self, config: QwenMoeConfig) -> tuple[CacheSpec, ...]:
        """See `DecoderConfig.cache_specs`."""
        return config.cache_specs()

    def defaults(self, config: QwenMoeConfig, platform: str) -> Mapping[str, Any]:
        """Larger chunks on GPUs: of small ones, each expert gets few rows, and much of its last block is padding."""
        return {"chunked_prefill_size": 16384} if platform == "cuda" else {}

    def build(self, config: QwenMoeConfig, context: "BuildContext") -> "QwenMoeModel":
        """The model with empty parameters."""
        from hornbeam.models.qwen_moe.model import QwenMoeModel

        return QwenMoeModel(config, context)

    def weight_map(self, config: QwenMoeConfig) -> Mapping[str, Placement]:
        """See `weights.weight_map`."""
        return weight_map(config)


FAMILY = QwenMoeFamily()


def _default_windows(read: ConfigReader, row: Row, num_layers: int) -> list[bool]:
    """Which layers have a window where the config lists no kinds: all, or the even ones before max_window_layers."""
    if not row.shared_expert:
        return [True] * num_layers
    end = read.size("max_window_layers", 28, least=0)
    return [layer % 2 == 0 and layer < end for layer in range(num_layers)]


def _sparse_layers(read: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer, but those that `mlp_only_layers` lists."""
    dense = read.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"the config's mlp_only_layers must be a list of layers, not {dense!r}")
    step = read.size("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
