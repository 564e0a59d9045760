"""The contract of a model family: what a folder under `models/` offers to the rest.

A family declares; the core merges. Importing its `spec` module must not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.fp8 import Fp8Format


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureShape:
    """The routed experts of each mixture layer."""

    num_experts: int
    top_k: int  # experts of a token
    intermediate_size: int  # of one expert


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """Latent attention: a cached row has rank + rope_dim features, of which all heads make their keys and values.

    A head's query and key have nope_dim features without positions, then rope_dim rotated ones.
    """

    rank: int  # features of the latent
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What every part may know of a model; a family's own configuration extends it."""

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the checkpoint: "bfloat16", "float32", ...
    attention_scale: float | None = None  # of the products of queries and keys; None: head_dim ** -0.5
    attention_soft_cap: float | None = None  # c: scores x become c * tanh(x / c)
    attention_sinks: bool = False  # each layer has a score per head that takes its part of the softmax, for no key
    latent: LatentSizes | None = None  # latent attention; None: keys and values are cached
    mixture: MixtureShape | None = None  # None: the model is dense
    fp8: Fp8Format | None = None  # of the weights of products; None: they are as `dtype` says


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a checkpoint tensor goes: `parameter` of the model, as part `part` of it if several are fused.

    unpermute_heads undoes GGUF's order of rotary rows; ungroup_heads takes apart a tensor that holds, for each
    key-value head, its queries, key and value; add_one is for factors that are stored as what they differ from 1 by.
    Of tensors of experts, transpose swaps inputs and outputs, pairs takes apart interleaved outputs of gate and up,
    transpose_pairs does both.
    """

    parameter: str
    part: int | None = 0  # None: the tensor holds all parts
    expert: int | None = None  # the tensor is of this expert alone; None: of all, if the parameter has experts
    transform: Literal[
        "none", "unpermute_heads", "ungroup_heads", "add_one", "transpose", "pairs", "transpose_pairs"
    ] = "none"
    heads: int = 0  # heads in the tensor (ungroup_heads: key-value heads)
    head_dim: int = 0  # for ungroup_heads


class ModelFamily(Protocol):
    """One folder under `models/`; `FAMILY` in its `spec` module. `models/index.py` lists its architectures.

    Optional attributes, asked for by name where they matter: `step_state`, `chat_format`, `media`;
    `unread(config)`, beginnings of the names of tensors that belong to parts of a model which the family leaves out;
    `aliases`, beginning of names in the weight map -> what some checkpoints have in its place;
    and `load(config, context, checkpoint)`, the model with its weights, of a family whose models load themselves.
    """

    name: str

    def parse(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config. Raises ConfigError for a setting that the family does not implement."""

    def cache_specs(self, config: Any) -> tuple[CacheSpec, ...]:
        """The cache groups; their layers together are all layers that cache."""

    def defaults(self, config: Any, platform: str) -> Mapping[str, Any]:
        """Config values (flag name -> value) this family prefers on a platform; users' flags win."""

    def build(self, config: Any, context: Any) -> Any:
        """The model, without weights: `forward(ids, positions, fwd)` and `logits(hidden)`. Imports torch."""

    def weight_map(self, config: Any) -> Mapping[str, Placement]:
        """Every tensor the checkpoint must hold, by name, and its place. Nothing more, nothing less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostQuery:
    """A model that no family claims. `code`: the checkpoint's folder, if the code in it may be run, else None."""

    hf_config: Mapping[str, Any]
    code: Path | None


class Host(Protocol):
    """What runs models without a family of their own; `models/index.py` lists hosts."""

    def supports(self, query: HostQuery) -> str | None:
        """None if it can run the model, else the reason why not."""

    def family(self, query: HostQuery) -> ModelFamily:
        """The family that the model is served by."""
