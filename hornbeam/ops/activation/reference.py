"""Gated activations in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.query import OpQuery


class ReferenceActivation:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def silu_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def silu_mul_product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """See `Activation`."""
        return None

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up


BACKEND = ReferenceActivation()
