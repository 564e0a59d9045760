"""Integer products by the vector neural network instructions of a CPU, through torch."""

import torch
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.linear.int8_reference import two_terms
from hornbeam.ops.query import OpQuery


class CpuInt8:
    """See `Int8Product`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs; without such instructions torch's product is right but slow."""
        return needs_cpu(query)

    def linear(self, x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """See `Int8Product`."""
        if not len(x):
            return x.new_empty((0, len(values)))
        rounded, row_scales = two_terms(x)
        terms = torch._int_mm(rounded, values.t()).float().mul_(row_scales)
        out: Tensor = (terms[: len(x)] + terms[len(x) :]).mul_(scales)
        return out if bias is None else out.add_(bias)


BACKEND = CpuInt8()
