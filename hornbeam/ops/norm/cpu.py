"""RMS normalisation on a CPU: few passes over memory, and few operators where rows are few."""

import torch
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery


class CpuNorm:
    """See `Norm`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs in float32."""
        return needs_cpu(query) if query.dtype == "float32" else "needs float32"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * inverse).mul_(weight)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        return self.rms_norm(residual.add_(x if x.ndim == 2 else x.sum(0)), weight, eps)


BACKEND = CpuNorm()
