"""Integer products: weights of four or eight bits and activations of eight, rounded in groups of 32 features."""

import torch

from hornbeam.ops.linear.contract import GROUPED_LINEAR, GroupedProduct
from hornbeam.ops.query import OpQuery


class GroupedInt8:
    """See `Quantization`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs in float32, as the activations between products are."""
        if query.device != "cpu":
            return "needs a CPU"
        return None if query.dtype == "float32" else "needs --dtype float32"

    def create(self, query: OpQuery) -> GroupedProduct:
        """See `Quantization`."""
        return GROUPED_LINEAR.choose(query, probe=_probe).value


def _probe(product: GroupedProduct) -> None:
    product.pack(torch.zeros(16, 64)).linear(torch.zeros(2, 64), None)


QUANTIZATION = GroupedInt8()
