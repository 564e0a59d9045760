"""Integer products: the CPU's against the reference, and both against what they round."""

import pytest
import torch

from hornbeam.core.errors import ConfigError
from hornbeam.ops.linear.int8_cpu import CpuInt8
from hornbeam.ops.linear.int8_reference import ReferenceInt8, quantize_rows
from hornbeam.ops.query import OpQuery
from hornbeam.quant.contract import QUANTIZATIONS

pytestmark = pytest.mark.cpu
QUERY = OpQuery(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=8, page_size=16)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 70])
@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(64, 96, False), (576, 130, True), (70, 33, True)])
def test_equals_the_reference(num_rows: int, num_in: int, num_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    offset = torch.randn(num_out) if bias else None
    values, scales = quantize_rows(weight)
    arguments = x, values, scales.squeeze(1), offset
    actual, expected = CpuInt8().linear(*arguments), ReferenceInt8().linear(*arguments)
    torch.testing.assert_close(actual, expected)
    exact = x @ weight.T if offset is None else x @ weight.T + offset
    assert (actual - exact).abs().sum() <= 0.02 * exact.abs().sum()


def test_zeros_stay_zeros() -> None:
    values, scales = quantize_rows(torch.zeros(3, 8))
    assert not values.any()
    assert scales.isfinite().all()


def test_each_row_is_rounded_by_itself() -> None:
    packed = QUANTIZATIONS.choose(QUERY, "w8a8_int8").value.create(QUERY).pack(torch.randn(48, 64))
    x = torch.randn(5, 64) * torch.tensor([[1.0], [100.0], [1e-4], [1.0], [3.0]])
    alone = torch.cat([packed.linear(row[None], None) for row in x])
    torch.testing.assert_close(packed.linear(x, None), alone, rtol=0, atol=0)


def test_is_refused_where_it_cannot_run() -> None:
    query = OpQuery(device="cuda", dtype="bfloat16", num_heads=4, num_kv_heads=2, head_dim=8, page_size=16)
    with pytest.raises(ConfigError, match="w8a8_int8: needs"):
        QUANTIZATIONS.choose(query, "w8a8_int8")
