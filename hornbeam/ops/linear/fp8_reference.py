"""Products of eight-bit floats in plain torch: both sides are rounded, then multiplied in float32.

That sums what the kernels sum, each term exact; only the order of the sums differs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.linear.contract import SCALE_BLOCK, Fp8Weight, InputNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.query import OpQuery

LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_RANGE = 1e-10  # of zeros, which must not be divided by zero


class ReferenceFp8:
    """Serves every device and shape."""

    fused_rows = 0

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def linear(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        rounded = widened_rows(*round_rows(x, power_of_two=weight.power_of_two))
        wide_bias = None if bias is None else bias.float()
        return F.linear(rounded, widened(weight.values, weight.scales), wide_bias).to(x.dtype)

    def gated(self, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Fp8Product`."""
        return self.linear(ReferenceActivation().silu_mul(x), weight, bias)

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, weight: Fp8Weight, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `Fp8Product`."""
        total = x if residual is None else x + residual
        return self.linear(ReferenceNorm().rms_norm(total, norm.weight, norm.eps), weight, bias), total


def round_rows(x: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[T, K] -> [T, K] float8_e4m3fn and scales [T, ceil(K / 128)] float32, whose product is nearly x."""
    groups = _groups(x.float())
    scales = _scales(groups.abs().amax(-1), power_of_two)
    values = (groups * (1 / scales)[..., None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return values.flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def round_weight(weight: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[..., N, K] -> the same as float8_e4m3fn, and the scales of its blocks, see `Fp8Weight`."""
    wide = weight.float()
    columns = _groups(wide.abs()).amax(-1).transpose(-1, -2)
    largest = _groups(columns).amax(-1).transpose(-1, -2).contiguous()  # of each block
    scales = _scales(largest, power_of_two)
    values = (wide / _spread(scales, wide.shape)).clamp_(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scales


def widened(values: Tensor, scales: Tensor) -> Tensor:
    """The matrices [..., N, K] float32 that values and scales of blocks stand for."""
    return values.float().mul_(_spread(scales, values.shape))


def widened_rows(values: Tensor, scales: Tensor) -> Tensor:
    """The rows [T, K] float32 that values and scales of 128 features each stand for."""
    return values.float().mul_(scales.repeat_interleave(SCALE_BLOCK, -1)[..., : values.shape[-1]])


def _groups(x: Tensor) -> Tensor:
    """[..., K] -> [..., ceil(K / 128), 128], filled with zeros."""
    groups: Tensor = F.pad(x, (0, -x.shape[-1] % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    return groups


def _scales(largest: Tensor, power_of_two: bool) -> Tensor:
    scales = largest.clamp(min=_SMALLEST_RANGE) / torch.full_like(largest, LARGEST)  # exact on every device
    if not power_of_two:
        return scales
    # Adding just less than the unit of the exponent carries into it, unless the mantissa is zero.
    return ((scales.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales of blocks, once for each of the [..., N, K] elements."""
    rows = scales.repeat_interleave(SCALE_BLOCK, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(SCALE_BLOCK, -1)[..., : shape[-1]]


BACKEND = ReferenceFp8()
