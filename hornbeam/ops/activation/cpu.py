"""Gated activations on a CPU, in two passes over memory."""

import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery


class CpuActivation:
    """See `Activation`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs."""
        return needs_cpu(query)

    def silu_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def silu_mul_product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """See `Activation`."""
        return None

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        """See `Activation`."""
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh").mul_(up)


BACKEND = CpuActivation()
