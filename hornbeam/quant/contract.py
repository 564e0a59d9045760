"""Weights kept in another encoding than they are loaded in: derived copies that products are computed with."""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class PackedWeight(Protocol):
    """One weight matrix [N, K], encoded."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K], bias [N] -> x W^T + b, [T, N]."""


class Packing(Protocol):
    """An encoding, with the products of the machine at hand."""

    def pack(self, weight: Tensor, *, precise: bool = False) -> PackedWeight:
        """Encode a weight [N, K], which may be freed or changed afterwards; `precise` spends more on accuracy."""


class Quantization(Protocol):
    """A registry entry."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def create(self, query: OpQuery) -> Packing:
        """With the products that serve `query`."""


# Names are those of --quantization.
QUANTIZATIONS: Registry[OpQuery, Quantization] = Registry(
    "quantization", {"w8a8_int8": "hornbeam.quant.int8:QUANTIZATION", "bf16": "hornbeam.quant.bf16:QUANTIZATION"}
)
