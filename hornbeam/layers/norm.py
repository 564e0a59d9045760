"""RMS normalisation with its weight, alone or on its way into a product."""

import torch
from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear
from hornbeam.layers.parameters import empty_parameter
from hornbeam.ops.linear.contract import InputNorm


class RMSNorm(nn.Module):
    """Normalises; with a residual, adds first and keeps the sum.

    wide: the weight is float32, for models that learn how much it differs from 1: near 1 half precision is coarse.
    """

    def __init__(self, size: int, eps: float, context: BuildContext, *, wide: bool = False) -> None:
        super().__init__()
        self.weight = empty_parameter((size,), context, torch.float32 if wide else None)
        self.eps = eps
        self._norm = context.kernels.norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, H] -> [T, H]. With a residual, x may be in parts: see `Norm.add_rms_norm`."""
        if residual is None:
            return self._norm.rms_norm(x, self.weight, self.eps)
        return self._norm.add_rms_norm(x, residual, self.weight, self.eps)

    def as_input(self) -> InputNorm:
        """For products that normalise their input themselves."""
        return InputNorm(weight=self.weight, eps=self.eps)


def normed_linear(
    norm: RMSNorm, linear: Linear, x: Tensor, residual: Tensor | None, fwd: Forward
) -> tuple[Tensor, Tensor]:
    """linear(norm(x + residual)), and x + residual.

    As one kernel where that is faster. x and residual are [T, H], or what `Linear.added` returned; either may change.
    """
    if _fuse(linear, x, fwd, gated=False):
        return linear.normed(x, residual, norm.as_input(), gated=False)
    out = linear(norm(x, residual), fwd)
    return out, x if residual is None else residual


def normed_gated(
    norm: RMSNorm,
    gate_up: Linear,
    down: Linear,
    x: Tensor,
    residual: Tensor | None,
    fwd: Forward,
    *,
    factor: float = 1,
) -> tuple[Tensor, Tensor | None]:
    """factor * a gated layer of norm(x + residual), and x + residual, or what `Linear.added` makes of them."""
    gated = _fuse(gate_up, x, fwd, gated=True)
    if gated or _fuse(gate_up, x, fwd, gated=False):
        inner, residual = gate_up.normed(x, residual, norm.as_input(), gated=gated)
    else:
        normed, residual = norm(x, residual), x if residual is None else residual
        product = gate_up.gate(normed, fwd)
        gated, inner = product is not None, gate_up(normed, fwd) if product is None else product
    return down.added(inner, residual, fwd, gated=not gated, factor=factor)


def _fuse(linear: Linear, x: Tensor, fwd: Forward, *, gated: bool) -> bool:
    """Whether the norm is the product's; parts are added up by the norm's own kernel."""
    return x.ndim == 2 and fwd.adapters is None and linear.fuses(x.shape[0], gated=gated)
