"""Weights kept in another encoding than they are loaded in: derived copies that products are computed with."""

from typing import Protocol

from hornbeam.core.registry import Registry
from hornbeam.ops.linear.contract import GroupedProduct
from hornbeam.ops.query import OpQuery


class Quantization(Protocol):
    """A registry entry."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def create(self, query: OpQuery) -> GroupedProduct:
        """The products that serve `query`, which also encode the weights."""


# Names are those of --quantization.
QUANTIZATIONS: Registry[OpQuery, Quantization] = Registry(
    "quantization", {"grouped_int8": "hornbeam.quant.grouped_int8:QUANTIZATION"}
)
