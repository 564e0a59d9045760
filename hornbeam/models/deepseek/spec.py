"""What DeepSeek's models with latent attention are (V2, V2-Lite, V3, R1), as data. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import MixtureShape, Placement
from hornbeam.core.fp8 import read_fp8
from hornbeam.layers.decoder_config import DecoderConfig, LatentShape, read_decoder
from hornbeam.models.deepseek.gguf import ARCHITECTURE as GGUF
from hornbeam.models.deepseek.gguf import has_sigmoid, with_usual_names
from hornbeam.models.deepseek.weights import weight_map
from hornbeam.ops.rope.scaling import YarnScaling

if TYPE_CHECKING:
    from hornbeam.layers.context import BuildContext
    from hornbeam.models.deepseek.model import DeepseekModel

_LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others
_PAGE_SIZE = 64  # what kernels of latent attention read at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How an architecture routes where its config does not say so."""

    method: str  # topk_method
    scores: Literal["softmax", "sigmoid"]
    renormalizes: bool  # whether it heeds norm_topk_prob


ROWS: dict[str, Row] = {
    "DeepseekV2ForCausalLM": Row(method="greedy", scores="softmax", renormalizes=False),
    "DeepseekV3ForCausalLM": Row(method="noaux_tc", scores="sigmoid", renormalizes=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How a token's experts are chosen and weighed; the fields of `ops.moe.contract.RoutingRule`, and a correction."""

    scores: Literal["softmax", "sigmoid"]
    renormalize: bool
    factor: float
    num_groups: int
    num_kept_groups: int
    group_score: Literal["best", "two_best"]
    corrected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekConfig(DecoderConfig):
    """Sizes and switches of one model of the family. Its heads, to the rest, are the cached row and nothing else."""

    latent: LatentShape
    gate: Gate
    intermediate_size: int  # of dense layers
    sparse_layers: tuple[bool, ...]  # whether each layer has experts
    shared_size: int  # of the expert that every token takes; 0: there is none


class DeepseekFamily:
    """See `core.family.ModelFamily`."""

    name = "deepseek"

    def parse(self, hf_config: Mapping[str, Any]) -> DeepseekConfig:
        """Read a Hugging Face config. Raises ConfigError for what is missing, malformed or not implemented."""
        hf_config = with_usual_names(hf_config)
        for setting, supported in (
            ("hidden_act", "silu"),
            ("mlp_bias", False),
            ("rope_interleave", True),
        ):
            ConfigReader(hf_config).only(setting, supported)
        rope_dim = ConfigReader(hf_config).size("qk_rope_head_dim")
        read = ConfigReader({**hf_config, "head_dim": rope_dim, "num_key_value_heads": 1})
        shared = read_decoder(read)
        latent = _parse_latent(read)
        mixture = MixtureShape(
            num_experts=read.size("n_routed_experts"),
            top_k=read.size("num_experts_per_tok"),
            intermediate_size=read.size("moe_intermediate_size"),
        )
        num_dense, interval = read.size("first_k_dense_replace", 0, least=0), read.size("moe_layer_freq", 1)
        layers = range(shared["num_layers"])
        scale = (latent.nope_dim + latent.rope_dim) ** -0.5
        return DeepseekConfig(
            fp8=read_fp8(read),
            **shared | {"head_dim": latent.rank + latent.rope_dim},
            attention_scale=scale * _sharpness(read, shared["rope"].scaling),
            windows=(None,) * len(layers),
            mixture=mixture,
            tie_word_embeddings=read.switch("tie_word_embeddings"),
            latent=latent,
            gate=_parse_gate(read, _row(shared["architecture"], hf_config), mixture),
            intermediate_size=read.size("intermediate_size"),
            sparse_layers=tuple(layer >= num_dense and layer % interval == 0 for layer in layers),
            shared_size=read.size("n_shared_experts", 0, least=0) * mixture.intermediate_size,
        )

    def cache_specs(self, config: DeepseekConfig) -> tuple[CacheSpec, ...]:
        """One row per token: the normalised latent, then the rotated part of the key."""
        return (
            CacheSpec(
                kind="full",
                layers=tuple(range(config.num_layers)),
                row_shapes=((1, config.head_dim),),
                dtype=config.dtype,
                sharding="replicated",
            ),
        )

    def defaults(self, config: DeepseekConfig, platform: str) -> Mapping[str, Any]:
        """Larger pages than elsewhere; on GPUs larger chunks, as each expert gets few rows of small ones."""
        return {"page_size": _PAGE_SIZE} | ({"chunked_prefill_size": 16384} if platform == "cuda" else {})

    def build(self, config: DeepseekConfig, context: "BuildContext") -> "DeepseekModel":
        """The model with empty parameters."""
        from hornbeam.models.deepseek.model import DeepseekModel

        return DeepseekModel(config, context)

    def weight_map(self, config: DeepseekConfig) -> Mapping[str, Placement]:
        """See `weights.weight_map`."""
        return weight_map(config)

    def unread(self, config: DeepseekConfig) -> tuple[str, ...]:
        """The layer behind the last one, which drafts tokens; and shared experts of no width, which do nothing."""
        layers = range(0 if config.shared_size else config.num_layers)
        empty = (f"model.layers.{layer}.mlp.shared_experts." for layer in layers)
        return (f"model.layers.{config.num_layers}.", *empty)


FAMILY = DeepseekFamily()


def _parse_latent(read: ConfigReader) -> LatentShape:
    query_rank = None if read.values.get("q_lora_rank") is None else read.size("q_lora_rank")
    bias = read.switch("attention_bias")
    if bias and query_rank is None:
        raise ConfigError("this family implements attention_bias = true only with a q_lora_rank")
    return LatentShape(
        hidden_size=read.size("hidden_size"),
        num_heads=read.size("num_attention_heads"),
        query_rank=query_rank,
        rank=read.size("kv_lora_rank"),
        nope_dim=read.size("qk_nope_head_dim"),
        rope_dim=read.size("qk_rope_head_dim"),
        value_dim=read.size("v_head_dim"),
        eps=_LATENT_EPS,
        bias=bias,
    )


def _sharpness(read: ConfigReader, scaling: object) -> float:
    """What YaRN multiplies attention scores by: (0.1 mscale_all_dim ln(factor) + 1)^2, or 1 if the config has none."""
    rope = read.section("rope_parameters", "rope_scaling")
    if not isinstance(scaling, YarnScaling) or not rope.values.get("mscale_all_dim"):
        return 1.0
    return (0.1 * rope.number("mscale_all_dim") * math.log(max(scaling.factor, 1.0)) + 1) ** 2


def _row(architecture: str, hf_config: Mapping[str, Any]) -> Row:
    version = 3 if has_sigmoid(hf_config) else 2
    return ROWS[f"DeepseekV{version}ForCausalLM" if architecture == GGUF else architecture]


def _parse_gate(read: ConfigReader, row: Row, mixture: MixtureShape) -> Gate:
    read.only("scoring_func", row.scores)
    method = read.values.get("topk_method") or row.method
    if method not in ("greedy", "group_limited_greedy", "noaux_tc") or (method == "noaux_tc") != row.renormalizes:
        raise ConfigError(f"this family does not implement topk_method = {method!r} of {read.values['architectures']}")
    num_groups, num_kept = (1, 1) if method == "greedy" else (read.size("n_group", 1), read.size("topk_group", 1))
    group_size, rest = divmod(mixture.num_experts, num_groups)
    if rest or num_kept > num_groups or mixture.top_k > num_kept * group_size:
        raise ConfigError(
            f"the config gives each token {mixture.top_k} of {mixture.num_experts} experts, from {num_kept} of "
            f"{num_groups} groups: that cannot be"
        )
    return Gate(
        scores=row.scores,
        renormalize=row.renormalizes and read.switch("norm_topk_prob", True),
        factor=read.number("routed_scaling_factor", 1.0),
        num_groups=num_groups,
        num_kept_groups=num_kept,
        group_score="two_best" if method == "noaux_tc" else "best",
        corrected=method == "noaux_tc",
    )
