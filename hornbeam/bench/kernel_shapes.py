"""What cases of `bench kernels` are made of and from: one call and the work it means, and the sizes of a model.

Bytes count each input and output once; operations are those of products alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import LatentSizes, MixtureShape
from hornbeam.core.fp8 import Fp8Format
from hornbeam.core.registry import Registry
from hornbeam.models.index import find_family
from hornbeam.ops.query import OpQuery
from hornbeam.weights.checkpoint import open_checkpoint

PAGE_SIZE = 16
LATENT_PAGE_SIZE = 64
CONTEXT = 1024  # tokens that each decode row attends to
PROMPT = 512  # tokens of each prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call."""

    shape: str
    run: Callable[[], object]  # what is timed
    expected: Callable[[], Tensor]  # the reference's result
    actual: Callable[[], Tensor] | None = None  # the backend's; None: what `run` returns
    num_bytes: int
    num_flops: int = 0
    speed: int = 1  # of products: eight-bit ones are twice as fast as those of half precision
    captures: bool = True  # into a graph, so that no time of the host's is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model the shapes of its kernels follow from."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    latent: LatentSizes | None = None
    mixture: MixtureShape | None = None
    fp8: Fp8Format | None = None

    @property
    def page_size(self) -> int:
        """Of the cache."""
        return PAGE_SIZE if self.latent is None else LATENT_PAGE_SIZE

    def query(self, device: str, dtype: str) -> OpQuery:
        """What backends are asked."""
        return OpQuery(
            device=device,
            dtype=dtype,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            latent=self.latent,
            hidden_size=self.hidden_size,
            mixture=self.mixture,
            fp8=self.fp8 is not None,
        )


MakeCases = Callable[[Any, ModelShape, int, torch.device, torch.dtype], Iterator[Case]]


def _always(shape: ModelShape) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class OpCases:
    """Of one op: who can do it, what they are given, and the models that have it."""

    registry: Registry[OpQuery, Any]
    make: MakeCases
    occurs: Callable[[ModelShape], bool] = _always


def read_shape(folder: Path) -> ModelShape:
    """Of the model whose config.json is there. Raises ConfigError if there is none, or of no known family."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model-path {folder} has no config.json; what is needed of a model is its shape")
    hf_config = open_checkpoint(folder, "dummy").hf_config
    config = find_family(hf_config).parse(hf_config)
    return ModelShape(
        hidden_size=config.hidden_size,
        intermediate_size=ConfigReader(hf_config).size("intermediate_size"),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        latent=config.latent,
        mixture=config.mixture,
        fp8=config.fp8,
    )


def num_bytes(*tensors: Tensor) -> int:
    """Of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
