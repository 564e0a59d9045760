"""Sums that products leave in parts, on their way through norms."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.comm.grid import Grid
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.mlp import GatedMLP
from hornbeam.layers.norm import RMSNorm, normed_gated, normed_linear
from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.kernels import Kernels, choose_kernels
from hornbeam.ops.linear.reference import ReferenceLinear
from hornbeam.ops.query import OpQuery

pytestmark = pytest.mark.cpu


class Halves(ReferenceLinear):
    """Leaves the sums over both halves of the inputs apart."""

    def __init__(self, fused_rows: int) -> None:
        self.fused_rows = fused_rows

    def added(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        halves = zip(x.chunk(2, 1), weight.chunk(2, 1), strict=True)
        return torch.stack([F.linear(*half) for half in halves]), residual


class Whole(ReferenceActivation):
    """Applies gates inside products."""

    def silu_mul_product(self, x: Tensor, weight: Tensor) -> Tensor | None:
        return self.silu_mul(F.linear(x, weight))


QUERY = OpQuery(device="cpu", dtype="float32", num_heads=2, num_kv_heads=1, head_dim=16, page_size=16)
FORWARD = Forward(caches=(), groups=(), num_decode=3)


def gated(kernels: Kernels) -> tuple[RMSNorm, GatedMLP, Tensor, Tensor | None]:
    """A norm and a layer behind it, and what they make of three rows and a residual."""
    device = torch.device("cpu")
    context = BuildContext(grid=Grid(), kernels=kernels, dtype=torch.float32, device=device, context_len=64)
    torch.manual_seed(0)
    mlp, norm = GatedMLP(32, 64, context), RMSNorm(32, 1e-5, context)
    for weight in (mlp.gate_up.weight, mlp.down.weight, norm.weight):
        weight.normal_()
    return norm, mlp, *normed_gated(norm, mlp.gate_up, mlp.down, torch.randn(3, 32), torch.randn(3, 32), FORWARD)


@pytest.mark.parametrize("fused_rows", [0, 8])
def test_norms_add_parts_up(fused_rows: int) -> None:
    kernels, results = choose_kernels(QUERY), []
    for product in (ReferenceLinear(), Halves(fused_rows)):
        norm, mlp, x, residual = gated(dataclasses.replace(kernels, linear=product))
        assert x.ndim == (3 if isinstance(product, Halves) else 2)
        results.append(normed_linear(norm, mlp.gate_up, x, residual, FORWARD))
    torch.testing.assert_close(*results)


def test_gates_may_be_applied_inside_products() -> None:
    kernels = dataclasses.replace(choose_kernels(QUERY), linear=ReferenceLinear())
    apart, inside = (gated(dataclasses.replace(kernels, activation=a())) for a in (ReferenceActivation, Whole))
    torch.testing.assert_close(inside[2:], apart[2:])
