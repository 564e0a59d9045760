"""A product behind a norm, as one kernel where that is faster: the way into each half of a decoder block."""

from torch import Tensor

from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear
from hornbeam.layers.norm import RMSNorm
from hornbeam.ops.activation.contract import Activation
from hornbeam.ops.linear.contract import InputNorm


def normed_linear(
    norm: RMSNorm,
    linear: Linear,
    x: Tensor,
    residual: Tensor | None,
    fwd: Forward,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """linear(norm(x + residual)), gated by silu if there is an `activation`, and x + residual.

    x and residual are [T, H]; residual is None ahead of the first block, and may be changed in place.
    """
    gated = activation is not None
    if 1 <= x.shape[0] <= linear.product.fused_rows and fwd.adapters is None:
        settings = InputNorm(weight=norm.weight, eps=norm.eps)
        return linear.product.normed(x, residual, settings, linear.weight, linear.bias, gated=gated)
    out = linear(norm(x, residual), fwd)
    return activation.silu_mul(out) if activation is not None else out, x if residual is None else residual
