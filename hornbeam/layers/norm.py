"""RMS normalisation with its weight."""

from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.linear import empty_parameter


class RMSNorm(nn.Module):
    """Normalises; with a residual, adds first and keeps the sum."""

    def __init__(self, size: int, eps: float, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), context)
        self._eps = eps
        self._norm = context.kernels.norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H]. A given residual [T, H] becomes residual + x, in place, and its norm is returned."""
        if residual is None:
            return self._norm.rms_norm(x, self.weight, self._eps)
        return self._norm.add_rms_norm(x, residual, self.weight, self._eps)
