"""RMS normalisation in plain torch."""

import torch
from torch import Tensor

from hornbeam.ops.query import OpQuery


class ReferenceNorm:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (weight * wide.to(weight.dtype)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Norm`."""
        residual += x if x.ndim == 2 else x.sum(0)
        return self.rms_norm(residual, weight, eps)


BACKEND = ReferenceNorm()
