"""Integer products by groups: the kernels against the reference, and both against what they round."""

import pytest
import torch
from torch import Tensor

from hornbeam.ops.linear.contract import GROUP_SIZE, InputNorm
from hornbeam.ops.linear.grouped_native import NativeGroupedWeight
from hornbeam.ops.linear.grouped_reference import BACKEND as REFERENCE
from hornbeam.ops.linear.grouped_reference import rounded_activations, rounded_weight
from hornbeam.ops.native.loader import needs_library
from hornbeam.ops.query import OpQuery

QUERY = OpQuery(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=8, page_size=16)
LACKING = needs_library(QUERY)
pytestmark = pytest.mark.cpu
needs_native = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # sums of hundreds of products in another order


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


def on_a_grid(num_out: int, num_in: int, num_codes: int = 16) -> Tensor:
    """As a quantized file holds them."""
    groups = -(-num_in // GROUP_SIZE)
    codes = torch.randint(0, num_codes, (num_out, groups, GROUP_SIZE)).float()
    scales, minima = torch.rand(num_out, groups, 1).half().float() / 16, -torch.rand(num_out, groups, 1).half().float()
    return (codes * scales + minima).flatten(1)[:, :num_in].contiguous()


def activations(num_rows: int, num_in: int) -> Tensor:
    """With a few outliers, which have second terms."""
    x = torch.randn(num_rows, num_in)
    x[::2, num_in // 2] *= 50
    return x


@needs_native
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8, 9, 70])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (576, 130), (70, 33), (31, 1)])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_equals_the_reference(num_rows: int, num_in: int, num_out: int, bits: int) -> None:
    weight = torch.randn(num_out, num_in) if bits == 8 else on_a_grid(num_out, num_in, 2**bits)
    packed = NativeGroupedWeight(weight)
    assert packed.bits == (4 if bits == 4 else 8)
    x, bias = activations(num_rows, num_in), torch.randn(num_out)
    actual = packed.linear(x, bias)
    torch.testing.assert_close(actual, REFERENCE.pack(weight).linear(x, bias), **CLOSE)
    sizes = x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    assert ((actual - x @ weight.T - bias).abs() <= 0.01 * sizes).all()


@needs_native
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_fused_norm_and_gate(has_residual: bool, gated: bool) -> None:
    weight, bias = on_a_grid(96, 70), torch.randn(96)
    x, residual = activations(11, 70), torch.randn(11, 70) if has_residual else None
    norm = InputNorm(weight=torch.rand(70), eps=1e-5)
    packed = NativeGroupedWeight(weight)
    assert packed.fuses(gated=gated)
    before = x.clone()
    actual, total = packed.normed(x, residual, norm, bias, gated=gated)
    expected, expected_total = REFERENCE.pack(weight).normed(x, residual, norm, bias, gated=gated)
    assert x.equal(before)
    torch.testing.assert_close(total, expected_total)
    assert (actual - expected).abs().max() < 0.01 * expected.abs().max()  # a code may differ by one where norms do


@needs_native
def test_a_row_does_not_depend_on_the_others() -> None:
    packed = NativeGroupedWeight(on_a_grid(1000, 200))
    x = activations(37, 200) * torch.logspace(-4, 4, 37)[:, None]
    together = packed.linear(x, None)
    assert together.equal(torch.cat([packed.linear(row[None], None) for row in x]))
    assert together.equal(torch.cat([packed.linear(part, None) for part in x.split(5)]))


def test_integers_lose_nothing() -> None:
    weight = on_a_grid(24, 80)
    torch.testing.assert_close(rounded_weight(weight), weight, rtol=1e-3, atol=1e-3)
    signed = torch.randint(-126, 127, (24, 3, GROUP_SIZE)).float()
    signed[..., 5] = -127.0  # integers of eight bits are rounded to their largest magnitude
    signed = (signed * torch.rand(24, 3, 1).half().float()).flatten(1)
    torch.testing.assert_close(rounded_weight(signed), signed, rtol=1e-3, atol=0.1)
    if LACKING is None:
        assert NativeGroupedWeight(signed).bits == 8
    centred = torch.randint(-8, 7, (24, 96)).float() * 0.01  # whose largest code may be missing
    torch.testing.assert_close(rounded_weight(centred), centred, rtol=1e-3, atol=1e-4)


def test_zeros_stay_zeros() -> None:
    assert not rounded_activations(torch.zeros(2, 40)).any()
    assert not REFERENCE.pack(torch.zeros(3, 40)).linear(torch.randn(2, 40), None).any()
    if LACKING is None:
        packed = NativeGroupedWeight(torch.zeros(3, 40))
        assert not packed.linear(torch.randn(2, 40), None).any()
        assert not packed.linear(torch.zeros(2, 40), None).any()


def test_outliers_leave_the_rest_its_bits() -> None:
    x = torch.randn(4, 64)
    x[:, 3] = 300.0
    assert (rounded_activations(x) - x).abs().max() < 0.02  # one term of 300 would leave 1.2
