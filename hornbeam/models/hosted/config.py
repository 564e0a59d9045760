"""A hosted model as data. Imports neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hornbeam.core.family import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedLayer:
    """One layer's attention, as the module that does it asks for it."""

    module: str  # its name in transformers' model
    scale: float  # of the products of queries and keys
    window: int | None  # a query sees only the last so many tokens, itself included


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedConfig(ModelConfig):
    """A config as it is, and what its model turned out to be."""

    hf_config: Mapping[str, Any]
    code: Path | None  # the checkpoint's folder, if the code in it may be run
    layers: tuple[HostedLayer, ...]
    value_dim: int  # features of a value head; the cache pads them to `head_dim`
